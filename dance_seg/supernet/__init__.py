"""Many networks in one: a supernet is trained once, and a network that fits a budget is taken out of it.

`space` says which networks there are, as plain data; `elastic` and `prefix` hold the layers that run at several sizes,
the latter at several in one pass; `sampling` says which networks a step trains, `recalibrate` gives one its own
statistics; `search` finds the best within a budget and `front` all that none beats, their candidates kept by `storage`,
their milliseconds known from `latency_table`.
"""
