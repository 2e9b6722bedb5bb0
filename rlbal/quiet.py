"""Libraries' own notices that nobody at the keyboard can act on."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Silence weight-loading bars, deprecations between libraries, and DeepSpeed's search for a GPU.

    Call it before TRL is imported.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|torch\.distributed")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
