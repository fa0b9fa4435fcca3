"""Many networks in one: a supernet is trained once, and a network that fits a budget is taken out of it.

`space` says which networks there are, as plain data; `elastic` holds the layers that run at several sizes.
"""
