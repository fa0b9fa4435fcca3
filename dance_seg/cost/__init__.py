"""What a network and its training cost, and what the figures leave out.

MACs, parameters and activations are counted from the operations performed (macs.py), latency and joules are measured
(latency.py, energy.py), and what a training run has spent is added up step by step (ledger.py). Nothing here trains.
"""
