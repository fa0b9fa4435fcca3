"""Data slimming: which pixels are worth paying for (DANCE, arXiv 2107.07706, the data half).

An image's spatial complexity decides how far it is downsampled, whether an epoch drops it, and how much its loss
counts. `complexity` scores an image, `plan` decides for an epoch; `datamodules.sampler` makes batches of one scale of
it, and `dance_seg.losses.weighted_mean` is where the weight meets the loss. Costs one pass of Sobel filters over the
training images, once. Known of the paper: the three actions from one score. Ours, since its text could not be read in
full: the formula of the score, the mapping, the schedules and every default.
"""
