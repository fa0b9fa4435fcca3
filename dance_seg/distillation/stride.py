"""When the teacher is asked next: from the accuracy at a key frame to the number of frames until the one after it."""


def geometric(stride: int, accuracy: float, threshold: float, stride_min: int, stride_max: int) -> int:
    """Twice the stride when the accuracy after the updates is above the threshold, else half of it, within the limits.

    JITNet's rule. Updates stop at an accuracy equal to the threshold and the stride grows only above it, so at
    equality it is halved. Strides are whole numbers: half of 9 is 4.

    >>> [geometric(16, accuracy, 0.9, 8, 64) for accuracy in (0.95, 0.9, 0.5)]
    [32, 8, 8]
    >>> geometric(64, 0.95, 0.9, 8, 64), geometric(8, 0.5, 0.9, 8, 64), geometric(9, 0.5, 0.9, 2, 64)
    (64, 8, 4)
    """
    wanted = 2 * stride if accuracy > threshold else stride // 2
    return min(max(wanted, stride_min), stride_max)


def linear(stride: int, accuracy: float, threshold: float, stride_min: int, stride_max: int) -> int:
    """The stride times rho, rounded down, within the limits: ShadowTutor's rule.

    rho rises from 0 at accuracy 0 over 1 at the threshold to 2 at accuracy 1, on two straight lines:
    rho = a / tau up to tau, (a + 1 - 2 tau) / (1 - tau) above it.

    >>> [linear(32, accuracy, 0.8, 8, 64) for accuracy in (0.0, 0.4, 0.8, 0.9, 1.0)]
    [8, 16, 32, 48, 64]
    """
    if accuracy <= threshold:
        rho = accuracy / threshold
    else:
        rho = (accuracy + 1 - 2 * threshold) / (1 - threshold)
    return min(max(int(stride * rho + 1e-9), stride_min), stride_max)  # 32 x 1.5 must not become 47


CONTROLLERS = {"geometric": geometric, "linear": linear}
