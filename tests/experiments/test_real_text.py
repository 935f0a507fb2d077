"""The real-text testbeds: what is read of packages, who holds what, and a pre-training that survives its sittings."""

import gzip
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments.pretrain import corpus, overlap, text, training
from experiments.pretrain.base import sittings
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from experiments import docstrings, wordnet
from fedloom.errors import DataError

NOUNS = """\
  1 This software and database is being provided to you, the LICENSEE, by
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is known to have its own distinct existence
00001930 05 n 02 big_cat 0 cat 1 001 @ 00001740 n 0000 | any of several large cats; "the big cat roared"
00001931 05 n 01 dog 0 000 | {long}
"""
ADJECTIVES = '00003000 00 s 01 galore(ip) 0 000 | in great numbers; "daffodils galore"\n'


@pytest.fixture
def database(tmp_path):
    """A WordNet of a few synsets."""
    folder = tmp_path / "wordnet"
    folder.mkdir()
    (folder / "data.noun").write_text(NOUNS.format(long="a " * 100))
    (folder / "data.adj").write_text(ADJECTIVES)
    many = (f"{n:08} 29 v 01 verb{n} 0 000 | to do what number {n} does" for n in range(400))
    (folder / "data.verb").write_text("\n".join(many))
    (folder / "data.adv").write_text("")
    return folder


def test_synsets_have_a_file_a_word_and_a_gloss_without_its_examples(database):
    found = {synset.word: synset for synset in wordnet.synsets(database)}
    assert found["entity"].file == "noun.Tops" and found["big cat"].file == "noun.animal"
    assert found["big cat"].gloss == "any of several large cats"
    assert found["galore"] == wordnet.Synset("adj.all", "galore", "in great numbers")
    assert "dog" not in found, "a gloss that is too long is left out"


def test_a_folder_without_wordnet_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no data.noun: give --source"):
        wordnet.write_data(tmp_path, tmp_path / "bed")


def test_a_synset_is_in_one_split_and_one_direction(database, tmp_path):
    counts = wordnet.write_data(database, tmp_path / "bed")
    places = {}
    for path in sorted((tmp_path / "bed").rglob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            synset = (row["prompt"] + row["completion"]).replace("\nword:", " ").replace(" (verb)\nmeaning:", " ")
            number = next((word for word in synset.split() if word.isdigit()), synset)
            places.setdefault(number, []).append(path)
    assert all(len(found) == 1 for found in places.values())
    assert counts["verb.body"] == 400 - 2 * (wordnet.HELD_OUT + wordnet.VALIDATION) and counts["noun.Tops"] == 1
    assert {path.stem for path in (tmp_path / "bed" / "heldout").iterdir()} == {"word", "gloss"}


def test_the_data_that_are_shipped_are_45_clients_and_say_whose_they_are():
    shipped = wordnet.Path(wordnet.__file__).with_name("testbeds") / "wordnet"
    sizes = {path.name: len((path / "train.jsonl").read_text().splitlines()) for path in (shipped / "data").iterdir()}
    assert sorted(sizes) == sorted(wordnet.FILES) and min(sizes.values()) == sizes["noun.motive"] < 40
    held = [json.loads(line) for path in (shipped / "heldout").iterdir() for line in path.read_text().splitlines()]
    trained = {line for path in (shipped / "data").rglob("*.jsonl") for line in path.read_text().splitlines()}
    assert len(held) > 1000 and not trained & {json.dumps(row, ensure_ascii=False) for row in held}
    assert "Copyright 2006 by Princeton University" in (shipped / "LICENSE").read_text()


def test_docstrings_are_first_lines_of_documented_code(tmp_path, monkeypatch):
    library = tmp_path / "lib"
    (library / "tests").mkdir(parents=True)
    code = 'def f{0}(a: int, *, b=2) -> str:\n    """Return what number {0}\n    says.\n\n    More."""\n'
    (library / "code.py").write_text("".join(code.format(n) for n in range(50)) + 'class C(dict):\n    """Short."""\n')
    (library / "broken.py").write_text("def (")
    (library / "tests" / "test_code.py").write_text(code.format(99))
    found = list(docstrings.pairs(library))
    assert len(found) == 50 and found[0] == ("def f0(a: int, *, b=2) -> str:", "Return what number 0 says.")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(docstrings, "LIBRARIES", ("lib",))
    (library / "__init__.py").touch()
    assert docstrings.write_data(tmp_path / "bed") == {"lib": 40}
    rows = {
        split: (tmp_path / f"bed/data/lib/{split}.jsonl").read_text() for split in ("train", "validation", "heldout")
    }
    assert [len(text.splitlines()) for text in rows.values()] == [40, 5, 5]
    assert json.loads(rows["heldout"].splitlines()[0])["completion"].endswith('says."""')
    monkeypatch.setattr(docstrings, "LIBRARIES", ("no_such_library",))
    with pytest.raises(DataError, match="no_such_library is not installed"):
        docstrings.write_data(tmp_path / "bed")


@pytest.mark.parametrize(
    ("kind", "given", "document"),
    [
        (
            "dictionary",
            'Abjurer \\Ab*jur"er\\, n.\n   One who {abjures}.\n   [1913 Webster]',
            "Abjurer , n. One who abjures.",
        ),
        ("html", "<head><title>no</title></head><p>One <b>two</b></p><script>x</script><p>three", "One two\nthree"),
        ("xml", "<page><p>One\n   two</p></page>", "One\ntwo"),
        ("plain", "Title\n=====\n\n.. note::\n\nSee :func:`~os.path`.", "Title\n\n\n\nSee os.path."),
        ("pod", "=head1 NAME\n\nB<perl> is I<< it >>", "NAME\n\nperl is it"),
        ("troff", '.TH X 1\n.SH NAME\n.B ls\n\\fBlist\\fR \\-l\n.\\" no', "NAME\nls\nlist -l"),
        ("fortunes", "first\n%\nsecond", "first"),
        (
            "quoted",
            'name= _ "Short"\nmessage= _ "A message that is rather long, as they are in scenes."',
            "Short A message that",
        ),
        ("docstrings", 'def f(x):\n  """Double."""', 'def f(x):\n    """Double."""'),
    ],
)
def test_each_kind_of_file_becomes_plain_text(kind, given, document, monkeypatch):
    monkeypatch.setattr(text, "SHORTEST", 1)
    found = next(text.documents(kind, given))
    assert " ".join(found.split()).startswith(" ".join(document.split()))


def test_what_gcide_has_from_wordnet_is_left_out():
    entries = "Ab \\Ab\\, n.\n   The first of all, which is Webster's own.\n   [1913 Webster]\n\n"
    entries += "Ac \\Ac\\, n.\n   The second, from another dictionary.\n   [WordNet 1.5]\n"
    assert [found.split()[0] for found in text.documents("dictionary", entries)] == ["Ab"]


def test_a_corpus_is_made_of_packages_without_repetitions(tmp_path, monkeypatch):
    (tmp_path / "SOURCES").write_text("")
    package = tmp_path / "docs" / "usr"
    package.mkdir(parents=True)
    pages = [f"Page {n % 150} says what there is to say about number {n % 150}." for n in range(200)]
    for number, page in enumerate(pages):
        (package / f"{number}.txt.gz").write_bytes(gzip.compress(page.encode()))
    monkeypatch.setattr(corpus, "sources", lambda: [corpus.Source("docs", "plain", "usr/*.gz")])
    sizes = corpus.build(tmp_path, tmp_path / "corpus.zst")
    trained, held = (list(corpus.stored(tmp_path / "corpus.zst", split)) for split in ("train", "heldout"))
    assert (len(trained), len(held)) == (148, 2) and set(trained + held) == set(pages)
    assert sizes == {"docs": sum(len(page) for page in set(pages))}


def test_a_package_that_does_not_come_is_named(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package nowhere\n")
    monkeypatch.setattr(corpus.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(corpus.subprocess, "run", lambda *args, **settings: failed)
    with pytest.raises(DataError, match=r"package nowhere .*Unable to locate package nowhere"):
        corpus.fetch(corpus.Source("nowhere", "plain", "*"), tmp_path)


def test_eight_words_in_a_row_are_found_whatever_stands_between_them():
    seen = overlap.share_seen(
        ["one two three four five six seven eight nine"], ["One, two: three four (five) six seven EIGHT!"]
    )
    assert seen == (1, 2)


def test_a_sitting_goes_on_as_if_it_had_not_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LENGTH", 8)
    monkeypatch.setattr(training, "BATCH", 2)
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    tokens = np.arange(400, dtype=np.uint16) % 20
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True)

    def sitting():
        torch.manual_seed(0)
        return training.new_sitting(LlamaForCausalLM(config))

    def train(begun, steps, folder):
        folder.mkdir(exist_ok=True)
        training.train(begun, tokens, tokens[:64], steps, folder, 0, lambda line: None)
        return begun.model.state_dict()

    monkeypatch.setattr(training, "DECAY", 1e-9)  # the rate does not depend on the end
    whole = train(sitting(), 4, tmp_path / "whole")
    train(sitting(), 2, tmp_path / "parts")
    resumed = sitting()
    training.load(resumed, tmp_path / "parts" / "checkpoint.pt")
    assert resumed.step == 2
    parts = train(resumed, 4, tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not torch.equal(whole["model.norm.weight"], torch.ones(16))


def test_the_rate_rises_stays_and_falls():
    rates = [training.rate(step, 1000) for step in range(1001)]
    assert rates[0] == 0.01 and rates[99:800] == [1.0] * 701 and rates[900] == 0.5 and rates[1000] == 0.0


@pytest.mark.parametrize(("width", "millions", "heads"), [(128, 1.23, (2, 1)), (512, 9.83, (8, 2))])
def test_bases_of_several_widths_have_heads_of_one_size(width, millions, heads):
    tokenizer = AutoTokenizer.from_pretrained(Path(wordnet.__file__).with_name("testbeds") / "wordnet" / "model")
    model = training.new_model(tokenizer, width)
    assert model.num_parameters() == pytest.approx(1e6 * millions, rel=0.01)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == heads
    assert model.config.hidden_size // heads[0] == 64


def test_a_base_of_another_width_has_a_folder_of_its_own():
    assert sittings(Path("runs/base"), 512) == Path("runs/base")
    assert sittings(Path("runs/base"), 128) == Path("runs/base/width-128")
