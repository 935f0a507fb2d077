"""Every recipe as its user plays it: only the model is tiny and random, and the Hub has a few rows of each data set."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

import tiny_models
import written_data
from fedloom.adapters.config import read_config
from fedloom.cli import main as cli
from fedloom.records.configfile import load_config
from fedloom.records.ledger import Training, read_rows
from fedloom.report import figure

RECIPES = Path(__file__).parents[2] / "recipes"
ROWS = {
    ("sahil2801/CodeAlpaca-20k", None): {"instruction": "add the list", "input": "[1, 2]", "output": "sum(x)"},
    ("medalpaca/medical_meadow_medqa", None): {
        "input": "Q: which one? {'A': 'x', 'B': 'y'}",
        "instruction": "Please answer with one of the options in the bracket",
        "output": "A: x",
    },
    ("gbharti/finance-alpaca", None): {"instruction": "what is a bond?", "input": "", "output": "a loan", "text": ""},
    ("openai/gsm8k", "main"): {"question": "what is 1 + 2?", "answer": "1 + 2 = 3\n#### 3"},
    ("DigitalLearningGmbH/MATH-lighteval", "default"): {
        "problem": "find x + 1 for x = 1",
        "level": "Level 1",
        "solution": "it is 2",
        "type": "Algebra",
    },
    ("databricks/databricks-dolly-15k", None): {
        "instruction": "name a city",
        "context": "",
        "response": "Oslo",
        "category": "open_qa",
    },
}
"""Data set and its configuration on the Hub → a row as it has them."""
MODELS = {
    "meta-llama/Llama-3.2-3B": tiny_models.llama,
    "meta-llama/Llama-3.2-1B": tiny_models.llama,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": tiny_models.llama,
    "Qwen/Qwen2-7B": tiny_models.qwen2,
}
"""Model of a recipe → a tiny one of its architecture."""
SHORT = [
    *("model.device=cpu", "model.threads=1", "federation.num_rounds=2"),
    *("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"),
]
FEW = {
    "fedsrd": ["training.max_steps=1"],
    "florist": ["training.num_train_epochs=0.5", "federation.fraction_train=0.03"],
}
PAPERS = sorted(RECIPES.glob("*.toml"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for make in set(MODELS.values()):
        make().save_pretrained(folder / make.__name__)
        tiny_models.tokenizer().save_pretrained(folder / make.__name__)
    return {name: folder / make.__name__ for name, make in MODELS.items()}


@pytest.mark.parametrize("recipe", PAPERS, ids=lambda path: path.stem)
def test_a_recipe_runs_on_rows_as_the_hub_has_them(
    recipe: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def stand_in(name: str, subset: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((name, subset))
        assert split == "train"
        many = 220 if "dolly" in name else 6
        return [
            {key: f"{value} {number}".strip() for key, value in ROWS[name, subset].items()} for number in range(many)
        ]

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    monkeypatch.setattr(figure, "save_figure", lambda *given: None)  # pictures take a third of the time
    config, out = load_config(recipe), tmp_path / "run"
    sets = [*SHORT, *FEW[config.method.name], f"model.path={models[config.model.path]}"]
    told = CliRunner().invoke(cli.app, ["run", str(recipe), "--out", str(out), *(f"--set={one}" for one in sets)])
    assert told.exit_code == 0, told.output
    trained = [row for row in read_rows(out / "ledger.jsonl") if isinstance(row, Training)]
    assert {row.round for row in trained} == {1, 2} and len(trained) == (8 if config.method.name == "fedsrd" else 6)
    adapted = read_config(out / "adapter")["target_modules"]
    assert any("v_proj" in name for name in adapted)
    assert any("down_proj" in name for name in adapted) == (config.lora.target_modules == "all-linear")
    dolly = {key for key in ROWS if "dolly" in key[0]}
    assert set(asked) == (dolly if config.method.name == "florist" else ROWS.keys() - dolly)


def test_there_is_a_recipe_for_every_model_and_kind_of_ranks() -> None:
    read = {path.stem: load_config(path) for path in PAPERS}
    assert {config.model.path for config in read.values()} == MODELS.keys()
    assert {config.method.settings["preset"] for config in read.values()} == {"paper"}
    assert [read[f"fedsrd-{name}"].lora.r for name in ("llama-3.2-3b", "qwen2-7b")] == [64, 32]
    for name in ("tinyllama", "llama-3.2-1b"):
        equal, mixed = (read[f"florist-{name}-{kind}"] for kind in ("equal", "mixed"))
        adapters = [mixed.lora_of(f"client-{index:02d}") for index in range(100)]
        ranks = [adapter.r for adapter in adapters]
        assert [ranks.count(rank) for rank in (4, 8, 16, 32, 64)] == [40, 20, 20, 10, 10]
        assert all(adapter.lora_alpha == 2 * adapter.r for adapter in adapters)
        assert equal.model_dump() == mixed.model_copy(update={"clients": {}}).model_dump()


def test_the_harness_knows_every_task_of_a_recipe() -> None:
    """Of the harness's own tasks a few folders are read: the whole list takes as long as all recipes together."""
    harness = Path(lm_eval.tasks.__file__).parent
    own = ("humaneval", "mbpp", "medqa", "medmcqa", "gsm8k", "hendrycks_math", "agieval", "mmlu")
    known = TaskManager(
        include_path=[str(RECIPES / "tasks"), *(str(harness / name) for name in own)], include_defaults=False
    )
    named = {task for path in PAPERS for task in load_config(path).evaluation.tasks}
    assert named == {"fedsrd", "mmlu"} <= set(known.all_tasks)
    ten = yaml.safe_load((RECIPES / "tasks" / "fedsrd.yaml").read_text())["task"]
    names = [one if isinstance(one, str) else one["task"] for one in ten]
    assert len(names) == 10 and set(names) <= set(known.all_tasks)
    law = yaml.safe_load((RECIPES / "tasks" / "lawbench.yaml").read_text())["task"]
    assert set(law) <= set(known.all_tasks)
    for path in PAPERS:
        if folder := load_config(path).evaluation.include_path:
            assert Path(folder) == RECIPES / "tasks"


CHOICE = {"A": "1", "B": "2", "C": "3", "D": "4"}
QUESTIONS = {
    "financeiq": [{"": "0", "Question": "甲", **CHOICE, "Answer": "B"}],
    "lawbench_knowledge": [
        {"instruction": "请选。", "question": "甲A:一;B:二;C:三;D:四。", "answer": "正确答案：B。"},
        {"instruction": "请选。", "question": "乙A:一;B:二;C:三;D:四。", "answer": "正确答案:C。"},
    ],
}
QUESTIONS["lawbench_cases"] = QUESTIONS["lawbench_knowledge"]


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_task_of_our_own_reads_rows_as_its_data_set_has_them(name: str, tmp_path: Path) -> None:
    config = yaml.safe_load((RECIPES / "tasks" / f"{name}.yaml").read_text())
    split = config.get("test_split") or config["validation_split"]
    Path(tmp_path / "rows.jsonl").write_bytes(written_data.lines(QUESTIONS[name]))
    config |= {"dataset_path": "json", "dataset_name": None}
    config["dataset_kwargs"] = {"data_files": {split: str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path)}
    task = ConfigurableTask(config=config)
    row = task.dataset[split][0]
    shown = task.fewshot_context(row, config["num_fewshot"])
    assert "甲" in shown and ("乙" in shown and "C" in shown.partition("甲")[0]) == name.startswith("lawbench")
    assert task.doc_to_choice(row) == ["A", "B", "C", "D"]
    scores = [(-1.0, False), (-0.5, False), (-2.0, False), (-3.0, False)]
    assert task.process_results(row, scores) == {"acc": 1.0}


def test_fineval_is_read_from_its_unpacked_files(tmp_path: Path) -> None:
    """One subject's answers are numbers: a reader of tables would give the column two types, and end there."""
    for name in ("fineval.yaml", "fineval.py"):
        shutil.copy(RECIPES / "tasks" / name, tmp_path)
    known = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with pytest.raises(FileNotFoundError, match=r"FinEval holds no \*_val.csv: fineval.yaml"):
        known.load("fineval")
    (tmp_path / "FinEval" / "val").mkdir(parents=True)
    words = {"A": "一", "B": "二", "C": "三", "D": "四"}
    for number, options in enumerate((words, CHOICE)):
        row = {"id": "0", "question": f"题{number}", **options, "answer": "B", "explanation": "因为"}
        (tmp_path / "FinEval" / "val" / f"{number}_val.csv").write_bytes(written_data.table([row]))
    task = known.load("fineval")["tasks"]["fineval"]
    first, second = task.dataset["validation"]
    assert task.fewshot_context(second, 0) == "题1\nA. 1\nB. 2\nC. 3\nD. 4\n答案："
    assert (task.doc_to_text(first)[:6], task.doc_to_target(first)) == ("题0\nA. ", "B")


def test_an_eight_client_run_of_the_first_version_is_a_matter_of_three_settings() -> None:
    sets = ["federation.num_clients=8", "federation.fraction_train=1.0", "federation.num_rounds=1"]
    recipe = RECIPES / "florist-tinyllama-equal.toml"
    head = recipe.read_text(encoding="utf-8")
    assert all(f"--set {one}" in head for one in sets)
    assert load_config(recipe, sets).federation.num_clients == 8


def test_comments_of_a_recipe_name_a_source_for_every_value() -> None:
    """A value has on its line, or in the lines before its table, whose it is: the paper's, the script's or ours."""
    for path in PAPERS:
        text = path.read_text(encoding="utf-8")
        tomllib.loads(text)
        for table in text.split("\n[")[1:]:
            name = table.partition("]")[0]
            for line in table.splitlines()[1:]:
                if "=" in line and not line.startswith(("#", " ")) and name in ("lora", "federation", "training"):
                    assert any(whose in line.lower() for whose in ("paper", "script", "ours", "v1")), (path.name, line)
