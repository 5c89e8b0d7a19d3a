"""What to change first where a step does not fit the memory of a device."""

from cmjax.targets.machines import GIB
from cmjax.targets.report import StepReport, StepRequest


def advice(report: StepReport, request: StepRequest) -> list[str]:
    """Settings by what they bring, each with the size that should fit, in the words of the command line.

    What grows with the batch (cache, exchange buffers, other temporaries) is taken to grow in proportion.
    """
    if report.memory is None or report.total is None:
        return []
    found = []
    if report.weights > report.memory:
        found.append(f"the weights alone are {report.weights / GIB:.1f} GiB a device")
    if request.quant is None:
        found.append("--quant int8 halves most of the weights")
    found.append(f"--{'ep' if request.role == 'decode' else 'prefill-ep'}: more devices hold fewer experts each")
    share = share_that_fits(report)
    if 0 < share < 1:
        found = [*_smaller(report, request, share), *found]
    return found


def share_that_fits(report: StepReport) -> float:
    """Of the batch, where memory and total are known; 0 or less where the weights alone fill the memory."""
    assert report.memory is not None
    assert report.total is not None
    return (report.memory - report.weights) / max(report.total - report.weights, 1)


def _smaller(report: StepReport, request: StepRequest, share: float) -> list[str]:
    found, microbatches = [], request.settings.get("microbatches", 1)
    if request.role == "decode":
        assert report.sequences is not None
        sequences = int(report.sequences * share) // microbatches * microbatches
        if sequences:
            found.append(f"--max-num-seqs {sequences} (of {report.sequences})")
    else:
        unit = request.ep_size * microbatches
        if tokens := int(report.tokens * share) // unit * unit:
            found.append(f"--max-num-batched-tokens {tokens} (of {report.tokens})")
    if report.cache > 0.2 * (report.total or 0):
        blocks = "--num-kv-blocks" if request.role == "decode" else "--num-prefill-kv-blocks"
        found.append(f"--max-model-len or {blocks}: the cache is {report.cache / GIB:.1f} GiB")
    return found
