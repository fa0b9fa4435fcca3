"""Network slimming: which channels and branches are worth keeping (DANCE, arXiv 2107.07706, the network half).

Channels that the downsampled data no longer needs are cut while training goes on, and cut for good: the tensors become
smaller, so that the rest of training, and inference, cost less on a clock. `schedule` says when and how far, `groups`
which channels must go together, `importance` which matter least, `branches` whether a whole scale can go, `surgery`
cuts, `slim` is these five in order, and `structure` is what a checkpoint needs to build the smaller network again.

Known of the paper: multi-scale modules are pruned progressively during training, together with the data. Ours, since
its text could not be read in full: that all channels may go and not only those of multi-scale modules (`only` says
otherwise), the measures, the times and every default. Network slimming (arXiv 1708.06519) gives the BatchNorm scale
with an L1 penalty, Early-Bird tickets (arXiv 1909.11957) the mask distance.

How the groups are found: by following labels through the operations of one forward on torch's meta device. A pruning
library's graph was the first thought: torch-pruning 1.6.1 cuts 38 (by magnitude) or 41 (by BatchNorm scale) of 55
pairs of SMP's architectures and encoders and fails on MAnet, PSPNet with MobileNets, Mix Transformers by magnitude
and DeepLabV3+ by BatchNorm scale, mostly where tensors are reshaped or joined; torch.fx cannot trace models with
control flow, and torch.export takes seconds. A forward that is watched at the level of ATen operations sees through
any Python code, takes a fraction of a second and no memory, needs a rule for some fifty operations, and freezes what
it has no rule for, so it errs by cutting too little and never by cutting wrongly.
`tests/dance_seg/network_slimming/test_coverage.py` cuts every pair.

Limits: channels that a LayerNorm normalises over stay (their removal would change the others), and so do those that
attention divides among heads; in Mix Transformers that leaves the hidden channels of the MLPs and the decoder.
"""

from dance_seg.network_slimming.groups import find_groups
from dance_seg.network_slimming.schedule import NetworkSlimming
from dance_seg.network_slimming.slim import slim

__all__ = ["NetworkSlimming", "find_groups", "slim"]
