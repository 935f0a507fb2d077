"""The demo's testbed made small, for tests that run what documentation and examples show."""

import re

from fedloom import testbeds


def small_testbed(folder):
    """The testbed in `folder`, with six examples in every file, two in a batch and one step; returns the folder."""
    whole = testbeds.testbed_folder()
    (folder / "model").symlink_to(whole / "model")
    for path in whole.glob("data/*/*.jsonl"):
        copy = folder / path.relative_to(whole)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:6]), encoding="utf-8")
    for name in ("demo.toml", "many.toml"):
        settings = (whole / name).read_text(encoding="utf-8")
        settings = re.sub(r"max_steps = \d+", "max_steps = 1", settings)
        settings = re.sub(r"per_device_train_batch_size = \d+", "per_device_train_batch_size = 2", settings)
        (folder / name).write_text(settings, encoding="utf-8")
    return folder
