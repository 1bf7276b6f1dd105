"""A thread that differentiates, as each GPU has one: it makes the nodes of a gradient, and numbers them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from pipeline.gan import second_order


@contextmanager
def device_thread(known: bool = True) -> Iterator[None]:
    """Everything is differentiated in one other thread, which second_order knows of, or not."""
    with ThreadPoolExecutor(1) as thread:

        def there(function: Any) -> Any:
            return lambda *args, **kwargs: thread.submit(function, *args, **kwargs).result()

        with (
            patch.object(torch.autograd, "grad", there(torch.autograd.grad)),
            patch.object(torch.autograd, "backward", there(torch.autograd.backward)),
            patch.object(second_order, "_has_a_thread", lambda device: known),
            patch.object(second_order, "_reached", {}),
        ):
            yield
