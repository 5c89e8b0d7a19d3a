"""The forms of the kernels' inner loops that this CPU runs."""

from cmjax.kernels.native import build


def use(form: str) -> bool:
    """Have the kernels run in a form, "" for their own choice; False where there is none such here."""
    library = build.load().library
    return library is not None and bool(library.cmjax_kernels_use(form.encode()))


FORMS = [form for form in build.FORMS if use(form)]
use("")
