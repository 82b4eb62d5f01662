"""One class for each error and each warning that a user can meet."""


class Mxfp4Error(Exception):
    """Base class of every error that mxfp4_fx raises on purpose."""


class OptionError(Mxfp4Error, ValueError):
    """An entry of ``torch.compile(options=...)`` or an argument is wrong."""


class KernelsUnavailableError(Mxfp4Error, RuntimeError):
    """The requested kernels cannot run on this device."""


class NativeBuildError(Mxfp4Error, RuntimeError):
    """The CPU's native kernels cannot be compiled or loaded."""


class WeightError(Mxfp4Error, ValueError):
    """An expert weight cannot be turned into MXFP4."""


class FreedWeightError(Mxfp4Error, RuntimeError):
    """A program uses a weight whose memory ``free_weights`` has given back."""


class DeviceFullError(Mxfp4Error, RuntimeError):
    """A device has no room for a swizzled weight beside the model's own."""


class CheckpointError(Mxfp4Error, ValueError):
    """A checkpoint cannot be read, is not what its config says, or cannot be written."""


class DequantizeError(Mxfp4Error, RuntimeError):
    """A model's experts cannot be made dense."""


class MissedRewriteError(Mxfp4Error, RuntimeError):
    """``strict=True``: experts are not rewritten, or the model has none."""


class PackageError(Mxfp4Error, ValueError):
    """A model cannot be exported, or an exported package cannot be loaded or called so."""


class TorchVersionError(Mxfp4Error, ImportError):
    """This torch lacks something that mxfp4_fx takes of it beyond its public API."""


class GradientError(Mxfp4Error, RuntimeError):
    """A forward-mode derivative, which MXFP4 experts do not have."""


class VerificationError(Mxfp4Error, RuntimeError):
    """``verify=True``: a rewritten region differs from the original by more than rounding."""


class PipelineError(Mxfp4Error, RuntimeError):
    """The passes broke their own contract. This is a bug of mxfp4_fx: please report it."""


class MissedRewriteWarning(UserWarning):
    """A layer that looks like a mixture of experts runs as it was written, not in MXFP4."""


class NoExpertsWarning(UserWarning):
    """A compiled or loaded model has nothing like a mixture of experts, or skips all of them."""


class WholeModelWarning(UserWarning):
    """``mxfp4_fx.compile`` cannot compile a layer in pieces, and compiles the model as a whole."""


class InflatedExpertsWarning(UserWarning):
    """A compiled model's experts are dense because transformers dequantized an MXFP4 checkpoint."""


class SlowKernelsWarning(UserWarning):
    """Experts run or are exported with kernels several times slower than the native ones."""


class CheckpointWarning(UserWarning):
    """A checkpoint is usable, but part of its files is left out or does not fit the rest."""


class NanWeightsWarning(UserWarning):
    """Blocks of an MXFP4 checkpoint have the scale byte 255, which makes their weights NaN."""


class DeviceFullWarning(UserWarning):
    """A dense weight did not fit on its device and is on the CPU."""


class KeptWeightsWarning(UserWarning):
    """``free_weights`` could not give a weight's memory back."""


class RepeatedSwizzleWarning(UserWarning):
    """An expert weight is swizzled at each call: the call brings another tensor or new values."""
