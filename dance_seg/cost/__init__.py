"""What a network and its training cost, and what the figures leave out.

MACs, parameters, activations and bytes are counted from the operations performed (macs.py), latency, throughput, memory
and joules are measured (latency.py, throughput.py, memory.py, energy.py), how much of the machine that uses is set
against what the machine attains (roofline.py), and what a training run has spent is added up step by step (ledger.py).
Joules that no meter gave are estimates, and are called so. Nothing here trains.
"""
