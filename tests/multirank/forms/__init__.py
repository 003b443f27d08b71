"""Forms of real jobs, each with what GRACE makes of it: right ids, or a refusal with a cure; never something in between.

A form is a function that trains a small engine in its way and may say what it found; :data:`FORMS` holds all of them, for the
test that runs them on two ranks and for the page of the documentation that lists them.
"""

from tests.multirank.forms import output, call, data, trusted, engine, failure  # noqa: F401, I001  in the order of the page
from tests.multirank.forms.registry import COLLECTED, COUNTED, FED, FORMS, LEFT_OUT, REFUSED, Form, markdown

__all__ = ["COLLECTED", "COUNTED", "FED", "FORMS", "LEFT_OUT", "REFUSED", "Form", "markdown"]
