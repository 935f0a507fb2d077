"""`fedloom evaluate`: a run's adapter scores what the run said, and the harness says what it says by itself."""

import json
import shutil

import pytest
from typer.testing import CliRunner

import fedloom
from fedloom.cli import main as cli
from fedloom.errors import ConfigError, ModelError
from fedloom.records.ledger import Evaluation, read_rows
from fedloom.studies import evaluation
from small_testbed import small_testbed

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{instruction}}}}\\n"
{target}
metric_list:
  - metric: {metric}
metadata:
  version: 1
"""
KINDS = {
    "skills_choice": ("multiple_choice", 'doc_to_target: 0\ndoc_to_choice: ["{{output}}", "no", "none"]', "acc"),
    "skills_greedy": (
        "generate_until",
        'doc_to_target: "{{output}}"\ngeneration_kwargs: {until: ["</s>"], max_gen_toks: 8}',
        "exact_match",
    ),
    "skills_words": ("loglikelihood_rolling", 'doc_to_target: "{{output}}"', "bits_per_byte"),
}


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """One round on the small testbed, with a metric of generated answers."""
    folder = small_testbed(tmp_path_factory.mktemp("testbed"))
    settings = {
        "lora.r": 2,
        "evaluation.metrics": ["token_f1"],
        "evaluation.max_new_tokens": 8,
        "training.learning_rate": 1e-2,
    }
    return fedloom.run(folder / "demo.toml", num_rounds=1, settings=settings, out=folder / "run"), folder


def rows(run, round):
    found = [row for row in read_rows(run.folder / "ledger.jsonl") if isinstance(row, Evaluation)]
    return {row.domain: row for row in found if row.round == round}


def same(one, other):
    """Up to float32's last digits: an exported adapter has its scale in other places."""
    assert one.keys() == other.keys()
    for domain, row in one.items():
        twin = other[domain]
        assert (row.exact_match, row.examples, row.tokens, row.bytes) == (
            twin.exact_match,
            twin.examples,
            twin.tokens,
            twin.bytes,
        )
        assert row.loss == pytest.approx(twin.loss, rel=1e-5) and row.metrics == pytest.approx(twin.metrics)
        assert row.bits_per_byte == pytest.approx(twin.bits_per_byte, rel=1e-5)


def test_a_run_scores_what_its_ledger_says_and_the_base_what_it_said_before(played):
    run, folder = played
    after, before = rows(run, 1), rows(run, 0)
    assert set(after) == {"bank", "clinic", "depot", "lab"} and all(row.examples == 6 for row in after.values())
    assert all(row.loss < before[domain].loss for domain, row in after.items()) and set(after["lab"].metrics) == {
        "token_f1"
    }
    same(fedloom.evaluate(run).rows, after)
    same(fedloom.evaluate(run, with_adapter=False).rows, before)
    told = fedloom.evaluate(
        run.adapter_folder, folder / "demo.toml", metrics=["token_f1"], settings={"evaluation.max_new_tokens": 8}
    )
    same(told.rows, after)
    assert told.scores["loss"]["mean"] == pytest.approx(run.heldout_losses["mean"], rel=1e-5)


def test_the_command_scores_a_model_on_a_file_and_prints_json_or_a_table(played):
    run, folder = played
    data = [
        "--data",
        str(folder / "data/lab/heldout.jsonl"),
        "--set",
        "data.template=plain",
        "--set",
        "model.threads=1",
    ]
    said = CliRunner().invoke(cli.app, ["evaluate", str(run.adapter_folder), *data, "--json"], catch_exceptions=False)
    tree = json.loads(said.stdout, parse_constant=pytest.fail)
    assert said.exit_code == 0 and tree["adapter"] == str(run.adapter_folder)
    assert tree["scores"]["loss"]["heldout"] == pytest.approx(rows(run, 1)["lab"].loss, rel=1e-5)
    assert tree["counts"]["heldout"]["bytes"] == rows(run, 1)["lab"].bytes
    said = CliRunner().invoke(cli.app, ["evaluate", str(folder / "model"), *data], catch_exceptions=False)
    assert said.exit_code == 0 and "no adapter" in said.stdout
    loss = next(line.split() for line in said.stdout.splitlines() if line.strip().startswith("heldout"))[2]
    assert float(loss) == pytest.approx(rows(run, 0)["lab"].loss, abs=1e-3)


def test_what_cannot_be_scored_is_told_in_one_line(played, tmp_path):
    run, folder = played
    (tmp_path / "empty").mkdir()
    shutil.copytree(run.adapter_folder, tmp_path / "pickled")
    (tmp_path / "pickled/adapter_model.safetensors").rename(tmp_path / "pickled/adapter_model.bin")
    shutil.copytree(run.adapter_folder, tmp_path / "nameless")
    named = json.loads((run.adapter_folder / "adapter_config.json").read_text())
    (tmp_path / "nameless/adapter_config.json").write_text(json.dumps({**named, "base_model_name_or_path": None}))
    shutil.copytree(run.folder, tmp_path / "under_way", ignore=shutil.ignore_patterns("adapter"))
    shutil.copytree(run.adapter_folder, tmp_path / "other")
    (tmp_path / "other/adapter_config.json").write_text(json.dumps({**named, "r": 3, "rank_pattern": {}}))
    data = folder / "data/lab/heldout.jsonl"
    for target, given, error, message in (
        ("empty", {}, ConfigError, "nothing that can be scored: expected the folder of a run, of a PEFT adapter"),
        ("under_way", {}, ConfigError, "holds no adapter yet: the run is not over"),
        ("nameless", {}, ConfigError, "does not say which base model it is for"),
        ("pickled", {"data": data}, ModelError, "save the adapter with safe_serialization=True"),
        ("other", {"data": data}, ModelError, "does not fit"),
        (folder / "model", {"base_model": "x"}, ConfigError, "is a base model already"),
        (folder / "model", {}, ConfigError, "nothing to score on: name held-out data"),
        (folder / "model", {"data": data, "metrics": ["bleu"]}, ConfigError, "expected chrf, rouge_l, token_f1"),
    ):
        with pytest.raises(error, match=message):
            fedloom.evaluate(tmp_path / target, **given)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the harness loads warns
def test_tasks_score_to_the_last_digit_what_the_harness_scores_alone(played, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run, folder = played
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = folder / "data/lab/heldout.jsonl"
    for name, (kind, target, metric) in KINDS.items():
        text = TASK.format(name=name, data=data, kind=kind, target=target, metric=metric)
        (tasks / f"{name}.yaml").write_text(text, encoding="utf-8")
    alone = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder / 'model'},peft={run.adapter_folder}",
        tasks=list(KINDS),
        batch_size=8,
        device="cpu",
        task_manager=TaskManager(include_path=str(tasks)),
    )["results"]
    told = fedloom.evaluate(run, tasks=list(KINDS), include_path=tasks)
    assert told.tasks.keys() == alone.keys() == KINDS.keys()
    for task, metrics in told.tasks.items():
        assert metrics == {name: value for name, value in alone[task].items() if isinstance(value, float)}
        assert any(not name.endswith("stderr") for name in metrics)
    same(told.rows, rows(run, 1))
    with pytest.raises(ConfigError, match="harness cannot play nothing_such"):
        fedloom.evaluate(run, tasks=["nothing_such"], include_path=tasks)


def test_tasks_of_the_settings_are_played_where_none_are_named(played, monkeypatch):
    asked = []

    def play(model, tokenizer, tasks, **given):
        asked.append((tuple(tasks), str(given["include_path"]), given["confirm_run_unsafe_code"]))
        return {"mine": {"acc": 0.5}}

    monkeypatch.setattr(evaluation, "lm_eval_tasks", play)
    own = {"evaluation.tasks": ["mine"], "evaluation.include_path": "/tasks", "data.heldout": None}
    run = played[0]
    assert fedloom.evaluate(run, settings=own).tasks == {"mine": {"acc": 0.5}}
    fedloom.evaluate(run, tasks=["other"], include_path="/others", confirm_run_unsafe_code=True, settings=own)
    assert asked == [(("mine",), "/tasks", False), (("other",), "/others", True)]
