"""One class for each failure a user can meet."""


class Mxfp4Error(Exception):
    """Base class of every error that mxfp4_fx raises on purpose."""


class OptionError(Mxfp4Error, ValueError):
    """An entry of ``torch.compile(options=...)``, or an argument, is wrong or not there yet."""


class KernelsUnavailableError(Mxfp4Error, RuntimeError):
    """The kernels that were asked for cannot run on this device."""


class NativeBuildError(Mxfp4Error, RuntimeError):
    """The CPU's native kernels cannot be compiled or loaded."""


class WeightError(Mxfp4Error, ValueError):
    """An expert weight cannot be turned into MXFP4."""


class FreedWeightError(Mxfp4Error, RuntimeError):
    """A weight is asked for its values after ``free_weights`` gave its memory back."""


class CheckpointError(Mxfp4Error, ValueError):
    """A checkpoint cannot be read, is not what its config says, or cannot be written."""


class DequantizeError(Mxfp4Error, RuntimeError):
    """A model's experts cannot be made dense."""


class MissedRewriteError(Mxfp4Error, RuntimeError):
    """``strict=True``: something looked like experts and was not rewritten, or nothing did."""


class TorchVersionError(Mxfp4Error, ImportError):
    """This torch lacks something that mxfp4_fx takes of it beyond its public API."""


class GradientError(Mxfp4Error, RuntimeError):
    """A derivative is asked for that MXFP4 experts do not have."""


class VerificationError(Mxfp4Error, RuntimeError):
    """``verify=True``: a rewritten region disagrees with the region that it replaced."""


class PipelineError(Mxfp4Error, RuntimeError):
    """The passes broke their own contract. This is a fault of mxfp4_fx: please report it."""


class MissedRewriteWarning(UserWarning):
    """Something looked like GPT-OSS experts and runs as it was written, not in MXFP4."""


class NoExpertsWarning(UserWarning):
    """Nothing looks like GPT-OSS experts: in a graph that was compiled, or a model loaded."""


class SlowKernelsWarning(UserWarning):
    """Experts run, or are exported, with kernels several times slower than the native ones."""


class CheckpointWarning(UserWarning):
    """A checkpoint serves, but something in its files is left out or does not fit the rest."""


class NanWeightsWarning(UserWarning):
    """Blocks of an MXFP4 checkpoint have the scale byte 255, which makes their weights NaN."""


class DeviceFullWarning(UserWarning):
    """A dense weight did not fit on its device and is on the CPU."""


class RepeatedSwizzleWarning(UserWarning):
    """An expert weight is swizzled at each call, because it is another one, or filled anew."""
