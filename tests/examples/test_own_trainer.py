"""TRL's trainer as a site's training step: what the example shows, with packing, and again with the same bits."""

import runpy
from pathlib import Path

import pytest

import fedloom
from fedloom.compress.quantize import quantize
from fedloom.lora.pair import digest, initial_state
from small_testbed import small_testbed

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_trainer.py"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The example's names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bed").mkdir()
    bed = small_testbed(tmp_path / "bed")
    monkeypatch.setattr("fedloom.face.settings.testbed_folder", lambda: bed)
    return runpy.run_path(str(EXAMPLE))


def test_the_script_differs_from_one_without_fedloom_in_three_lines():
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    marked = [line for line in lines if line.endswith(("# 1", "# 2", "# 3"))]
    assert len(marked) == 3 and all("fedloom" in line for line in marked)


def test_a_run_of_trl_trainers(script, capsys):
    script["main"]()
    said = capsys.readouterr().out
    assert "bank: loss" in said and "lab: loss" in said and "bytes up" in said


@pytest.mark.parametrize("name", ["fedsrd", "florist"])
def test_rounds_of_packed_rows_give_the_same_bits_again(name, script):
    def play() -> str:
        trainers = {site: script["trainer_of"](site) for site in ("bank", "lab")}
        for trainer in trainers.values():
            trainer.args.max_steps, trainer.args.gradient_accumulation_steps = 2, 2
        steps = {site: fedloom.patch(trainer) for site, trainer in trainers.items()}
        step = steps["bank"]
        shapes = {module: place.shape for module, place in step.placed.items()}
        job = fedloom.Job(fedloom.build(name), seed=0, quantize=quantize("fp32"), num_rounds=2)
        federation = fedloom.Federation(job, initial_state(shapes, dict.fromkeys(shapes, 16), 0), dict.fromkeys(steps))
        before = digest(federation.server.adapter)
        for _ in range(2):
            assert not federation.round(steps).refused
        assert {state.digest for state in federation.clients.values()} == {federation.server.digest}
        assert federation.server.digest != before
        return federation.server.digest

    assert play() == play()


def test_packing_stays_the_trainers(script):
    from trl import SFTTrainer

    trainer = script["trainer_of"]("bank")
    trainer.args.packing, trainer.args.packing_strategy = True, "wrapped"
    packed = SFTTrainer(
        model=trainer.model,
        args=trainer.args,
        train_dataset=script["rows_of"]("bank"),
        processing_class=trainer.processing_class,
    )
    assert len(packed.train_dataset) < len(trainer.train_dataset)
    assert fedloom.patch(packed).num_examples == len(packed.train_dataset)
