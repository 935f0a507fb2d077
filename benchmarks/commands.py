"""`python -m benchmarks …`: reads arguments, calls the measurements, prints tables or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from benchmarks.compared import add_to
from benchmarks.output import print_result
from fedloom.cli.funnel import Funnel
from fedloom.cli.options import AsJson, split_numbers, split_words
from fedloom.testbeds import testbed_folder

app = typer.Typer(
    cls=Funnel, no_args_is_help=True, pretty_exceptions_enable=False, help="Measurements that can be repeated."
)

WayIn = Literal["node", "supernode"]
Preset = Annotated[str, typer.Option(help="Model whose shapes are used.")]


@app.callback()
def benchmarks(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print tables as the documentation has them.")] = False,
) -> None:
    """Measurements that can be repeated."""


add_to(app)


@app.command("aggregate")
def aggregate_command(
    preset: Preset = "llama-3.2-3b",
    clients: Annotated[int, typer.Option(min=1, help="Clients.")] = 4,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every client; the preset's if left out.")] = None,
    ranks: Annotated[str, typer.Option(help="A rank for each client: 64,32,16.")] = "",
    methods: Annotated[str, typer.Option(help="Methods: fedsrd,florist.")] = "",
    modules: Annotated[str, typer.Option(help="Kinds of modules: q_proj,v_proj.")] = "",
    all_modules: Annotated[bool, typer.Option("--all-modules", help="Every layer, not one.")] = False,
    reference: Annotated[bool, typer.Option("--reference", help="Time the dense computation too; slow.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats; the median is kept.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the adapters.")] = 0,
    device: Annotated[str, typer.Option(help="Where the kernels run: cpu or cuda.")] = "cpu",
    torch_only: Annotated[bool, typer.Option("--torch-only", help="As if numba were not installed.")] = False,
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="Seconds of processor time, not of the clock.")] = False,
    keep_results: Annotated[
        bool, typer.Option("--keep-results", help="Hold the results of all modules until the last is done.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Server kernels on adapters of true shapes: seconds, memory and error."""
    from benchmarks import aggregate

    result = aggregate.run(
        preset=preset,
        clients=clients,
        rank=rank,
        ranks=split_numbers(ranks, "--ranks") or None,
        methods=split_words(methods) or None,
        modules=split_words(modules) or None,
        all_modules=all_modules,
        reference=reference,
        repeats=repeats,
        seed=seed,
        device=device,
        torch_only=torch_only,
        cpu_time=cpu_time,
        keep_results=keep_results,
    )
    print_result(result, aggregate.tables, as_json)


@app.command("round")
def round_command(
    preset: Preset = "llama-3.2-3b",
    methods: Annotated[str, typer.Option(help="Methods: fedsrd,fedsrd-e,florist,loom.")] = "fedsrd,florist,loom",
    clients: Annotated[str, typer.Option(help="Numbers of clients: 4,16.")] = "4,16",
    layers: Annotated[str, typer.Option(help="So many of the first layers, or all.")] = "1",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank; the preset's if left out.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats; the least is kept.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the changes.")] = 0,
    as_json: AsJson = False,
) -> None:
    """A server's whole turn, every client with a payload of its own: processor seconds part by part, and memory."""
    from benchmarks import server_turn

    some = None if layers == "all" else split_numbers(layers, "--layers")[0]
    result = server_turn.run(
        preset,
        split_words(methods),
        clients=split_numbers(clients, "--clients"),
        rank=rank,
        layers=some,
        repeats=repeats,
        seed=seed,
    )
    print_result(result, server_turn.tables, as_json)


@app.command("wire")
def wire_command(
    preset: Preset = "llama-3.2-3b",
    recorded: Annotated[
        Path | None, typer.Option(help="Folder of payloads that a run kept, instead of synthetic updates.")
    ] = None,
    structured: Annotated[bool, typer.Option("--structured", help="Updates with row and column structure.")] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank; the preset's if left out.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="The first layers only.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats; the fastest is kept.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the updates.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Payloads of an update and a broadcast: bytes against the entropy bound, seconds, error of each value coding."""
    from benchmarks import wire

    result = wire.run(preset, recorded, structured=structured, rank=rank, layers=layers, repeats=repeats, seed=seed)
    print_result(result, wire.tables, as_json)


@app.command("wan")
def wan_command(
    preset: Preset = "llama-3.2-3b",
    runs: Annotated[
        str, typer.Option(help="METHOD:VALUES, joined by commas.")
    ] = "fedit:fp32,fedsrd:fp32,fedsrd:bf16,fedsrd:int8,fedsrd:int4",
    up: Annotated[float, typer.Option(min=0.01, help="Mbit/s from a site.")] = 10.0,
    down: Annotated[float, typer.Option(min=0.01, help="Mbit/s to a site.")] = 50.0,
    rtt: Annotated[float, typer.Option(min=0, help="Milliseconds there and back.")] = 80.0,
    clients: Annotated[int, typer.Option(min=1, help="Updates that the server combines.")] = 4,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank; the preset's if left out.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="The first layers only.")] = None,
    scale: Annotated[float, typer.Option(min=1, help="Measure on a line so many times as fast.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the updates.")] = 0,
    as_json: AsJson = False,
) -> None:
    """The wall time of a round over a slow line, training left out; takes as long as the line does."""
    from benchmarks import wan

    line = wan.Line(up, down, rtt)
    result = wan.run(
        preset, split_words(runs), line=line, clients=clients, rank=rank, layers=layers, scale=scale, seed=seed
    )
    print_result(result, wan.tables, as_json)


@app.command("line")
def line_command(
    mebibytes: Annotated[
        float, typer.Option(min=0.1, help="MiB of the adapter's fp32 values; payloads are 2/3 of it.")
    ] = 6.5,
    kbit: Annotated[float, typer.Option(min=1, help="kbit/s each way.")] = 256.0,
    rtt: Annotated[float, typer.Option(min=0, help="Milliseconds there and back.")] = 200.0,
    loss: Annotated[float, typer.Option(min=0, max=0.5, help="Share of packets that are lost.")] = 0.02,
    cuts: Annotated[int, typer.Option(min=0, help="Cuts of a payload, at even distances.")] = 1,
    outage: Annotated[float, typer.Option(min=0, help="Seconds for which nobody connects after a cut.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the losses.")] = 0,
    as_json: AsJson = False,
) -> None:
    """A real site behind a line that is slow, loses packets and breaks: bytes and seconds of a round; takes minutes."""
    from benchmarks import line

    bad = line.Bad(kbit, rtt, loss, cuts, outage)
    print_result(line.run(bad, mebibytes=mebibytes, seed=seed), line.tables, as_json)


@app.command("compress")
def compress_command(
    preset: Preset = "llama-3.2-3b",
    methods: Annotated[str, typer.Option(help="Methods: loom,fedsrd.")] = "loom,fedsrd,fedit",
    budget: Annotated[str, typer.Option(help="Bytes of a turn, or a share, for methods that have a budget.")] = "",
    structured: Annotated[bool, typer.Option("--structured", help="Updates with row and column structure.")] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank; the preset's if left out.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="The first layers only.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats; the median is kept.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the updates.")] = 0,
    as_json: AsJson = False,
) -> None:
    """What it costs a client to choose, round and encode its update; `turn` sets that beside training."""
    from benchmarks import compress

    names = split_words(methods)
    print_result(
        compress.run(
            preset, names, budget=budget, structured=structured, rank=rank, layers=layers, repeats=repeats, seed=seed
        ),
        compress.tables,
        as_json,
    )


@app.command("flower")
def flower_command(
    rounds: Annotated[int, typer.Option(min=3, help="Rounds; the median is kept.")] = 6,
    mebibytes: Annotated[
        float, typer.Option(min=0.1, help="fp32 values of the adapter whose bytes are counted.")
    ] = 88.0,
    traffic: Annotated[bool, typer.Option(help="Count the bytes of a run over TLS too.")] = True,
    as_json: AsJson = False,
) -> None:
    """A federation on this machine: what a round costs beside training, and the ledger against Flower's own count."""
    from benchmarks import flower

    print_result(flower.run(rounds=rounds, mebibytes=mebibytes, traffic=traffic), flower.tables, as_json)


@app.command("memory")
def memory_command(
    adapter: Annotated[str, typer.Option(help="MiB of adapters in fp32.")] = "30,123",
    method: Annotated[str, typer.Option(help="Method.")] = "fedit",
    values: Annotated[str, typer.Option(help="Form of the values: fp32, bf16, int8, auto.")] = "fp32",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Peak memory of a worker and of the server app beside what they take at rest; without Flower and training."""
    from benchmarks import memory

    sizes = [float(size) for size in split_words(adapter)]
    print_result(memory.run(sizes, method=method, values=values, rounds=rounds), memory.tables, as_json)


@app.command("secagg")
def secagg_command(
    sites: Annotated[int, typer.Option(min=2, help="Sites.")] = 20,
    vanish: Annotated[int, typer.Option(min=0, help="Sites that vanish, in each phase once.")] = 5,
    values: Annotated[int, typer.Option(min=1, help="Length of a site's vector.")] = 100_000,
    bits: Annotated[int, typer.Option(min=1, max=32, help="Bits of a value, and of the sum.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the vectors.")] = 0,
    as_json: AsJson = False,
) -> None:
    """A secure sum of which some sites vanish: is it exact, processor time, bytes beside the vectors."""
    from benchmarks import secagg

    print_result(secagg.run(sites, vanish, values, bits, seed), secagg.tables, as_json)


@app.command("canaries")
def canaries_command(
    epsilon: Annotated[float, typer.Option(min=0.01, help="ε that the training is to keep.")] = 8.0,
    canaries: Annotated[int, typer.Option(min=10, help="Examples of random tokens, half of them trained on.")] = 100,
    guesses: Annotated[int, typer.Option(min=2, help="Canaries that the attacker guesses of.")] = 60,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the training.")] = 120,
    seed: Annotated[int, typer.Option(min=0, help="Seed of canaries and coins.")] = 0,
    as_json: AsJson = False,
) -> None:
    """An audit of noise on examples: ε bounded from below by what an attacker guesses, beside the ε that is stated."""
    from benchmarks import canaries as audit

    print_result(audit.run(epsilon, canaries, guesses, steps, seed), audit.tables, as_json)


@app.command("rounds")
def rounds_command(
    sites: Annotated[int, typer.Option(min=1, help="Sites, each with a worker of its own.")] = 2,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds; the median is kept.")] = 8,
    way: Annotated[WayIn, typer.Option(help="What carries the messages at the sites.")] = "node",
    as_json: AsJson = False,
) -> None:
    """A federation of real processes on this machine: where the time of a round goes beside training."""
    from benchmarks import rounds as measured

    print_result(measured.run(sites=sites, rounds=rounds, way=way), measured.tables, as_json)


@app.command("turn")
def turn_command(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="The demo's if left out.")] = None,
    methods: Annotated[str, typer.Option(help="Methods: fedit,loom. The settings' own if left out.")] = "",
    clients: Annotated[str, typer.Option(help="Clients: bank,lab. All if left out.")] = "",
    model: Annotated[str, typer.Option(help="A made-up model: smollm-135m.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Repeats; the median is kept.")] = 5,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting: lora.r=64.")] = None,
    as_json: AsJson = False,
) -> None:
    """A client's whole turn, stage by stage, against a bare training loop over the same batches."""
    from benchmarks import turn
    from fedloom.records.configfile import load_config

    path, own = config or testbed_folder() / "demo.toml", list(settings or ())
    chosen = [[*own, f"method.name={name}"] for name in split_words(methods)] or [own]
    configs = [load_config(path, given) for given in chosen]
    result = turn.run(configs, model=model, clients=split_words(clients), repeats=repeats)
    print_result(result, turn.tables, as_json)


@app.command("updates")
def updates_command(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="The demo's if left out.")] = None,
    density: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the elements to look at.")] = 0.01,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting: method.name=fedit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Kurtosis, overlap, spectrum and condition of what clients train, round by round; nothing is kept of the run."""
    from benchmarks import updates
    from fedloom.records.configfile import load_config

    folder = testbed_folder()
    result = updates.run(load_config(config or folder / "demo.toml", settings or ()), density=density)
    print_result(result, updates.tables, as_json)


@app.command("distortion")
def distortion_command(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="The demo's if left out.")] = None,
    bits: Annotated[str, typer.Option(help="Bits of a payload for a value of the adapter.")] = "0.1,0.3,1,2",
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting: method.name=fedit.")] = None,
    as_json: AsJson = False,
) -> None:
    """What loom's codes lose of real updates, beside the rate–distortion bound; nothing is kept of the run."""
    from benchmarks import distortion
    from fedloom.records.configfile import load_config

    rates = [float(number) for number in split_words(bits)]
    result = distortion.run(load_config(config or testbed_folder() / "demo.toml", settings or ()), bits=rates)
    print_result(result, distortion.tables, as_json)


@app.command("merge")
def merge_command(
    preset: Preset = "tinyllama",
    ranks: Annotated[str, typer.Option(help="A rank for each adapter.")] = "16,16,16,16",
    modules: Annotated[str, typer.Option(help="Kinds of modules: q_proj,v_proj; all if left out.")] = "",
    against: Annotated[
        str, typer.Option(help="PEFT's combinations; svd takes minutes, and all of them a base model in memory.")
    ] = "svd,cat,linear",
    repeats: Annotated[int, typer.Option(min=1, help="Repeats; the median is kept.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the adapters.")] = 0,
    as_json: AsJson = False,
) -> None:
    """`fedloom aggregate` against PEFT's add_weighted_adapter: seconds, memory and error over one layer."""
    from benchmarks import merge

    kinds, sizes = split_words(modules) or None, split_numbers(ranks, "--ranks")
    result = merge.run(
        preset=preset, ranks=sizes, modules=kinds, against=split_words(against), repeats=repeats, seed=seed
    )
    print_result(result, merge.tables, as_json)


@app.command("crowd")
def crowd_command(
    clients: Annotated[int, typer.Option(min=1, help="Clients that the demo's data are split among.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 100,
    method: Annotated[str, typer.Option(help="Method.")] = "fedsrd",
    made_up: Annotated[bool, typer.Option("--made-up", help="No model, no data: training adds noise.")] = False,
    attending: Annotated[int, typer.Option(min=1, help="Made-up clients that are asked in a round.")] = 100,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any other setting: key=value.")] = None,
    as_json: AsJson = False,
) -> None:
    """Very many clients, 1 % of them a round, 30 % dropping out: peak memory, seconds, bytes.

    --made-up: what the crowd itself costs at start-up, in a round, in the delivery.
    """
    from benchmarks import crowd
    from fedloom.records.configfile import load_config

    if made_up:
        own = [f"method.name={method}", *(settings or [])]
        print_result(crowd.run_made_up(clients, attending, rounds, own), crowd.made_up_tables, as_json)
        return
    wanted = [
        "data.partitioner=iid",
        f"federation.num_clients={clients}",
        f"federation.num_rounds={rounds}",
        "federation.fraction_train=0.01",
        "federation.drop_out=0.3",
        "federation.eval_every=0",
        "training.max_steps=1",
        f"method.name={method}",
        *(settings or []),
    ]
    folder = testbed_folder()
    print_result(crowd.run(load_config(folder / "demo.toml", wanted)), crowd.tables, as_json)


@app.command("buffered")
def buffered_command(
    slow: Annotated[float, typer.Option(min=1, help="How many times slower the first site is.")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, help="Synchronous rounds.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the asynchronous run.")] = 30,
    buffer: Annotated[int, typer.Option(min=1, help="Updates that make a step.")] = 3,
    method: Annotated[str, typer.Option(help="Method.")] = "fedsrd",
    specialists: Annotated[
        bool, typer.Option("--specialists", help="Each site has a domain of its own, not a share of all.")
    ] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any other setting: key=value.")] = None,
    as_json: AsJson = False,
) -> None:
    """One slow site of the demo's four: simulated time until asynchronous rounds have the score of synchronous ones."""
    from benchmarks import buffered
    from fedloom.records.configfile import load_config

    shared = ["data.partitioner=iid", "federation.num_clients=4"]
    common = [f"method.name={method}", *([] if specialists else shared), *(settings or [])]
    asynchronous = [
        "federation.mode=buffered",
        f"federation.num_rounds={steps}",
        f"federation.buffer_size={buffer}",
        f"federation.pace={{{'bank' if specialists else 'client-00'} = {slow}}}",
    ]
    demo = testbed_folder() / "demo.toml"
    synchronous = load_config(demo, [f"federation.num_rounds={rounds}", *common])
    result = buffered.run(synchronous, load_config(demo, [*asynchronous, *common]), slow)
    print_result(result, buffered.tables, as_json)


@app.command("catchup")
def catchup_command(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that the client misses.")] = 20,
    methods: Annotated[str, typer.Option(help="Methods, with presets: flora,florist:paper.")] = (
        "flora,florist:paper,florist,fedex"
    ),
    energies: Annotated[str, typer.Option(help="Shares of Σσ² to keep in a consolidation.")] = "1,0.99,0.9",
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any other setting: key=value.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a client of the demo that missed rounds is sent, and what a consolidation saves and costs."""
    from benchmarks import catchup
    from fedloom.records.configfile import load_config

    folder = testbed_folder()
    runs = {}
    for spec in split_words(methods):
        name, _, preset = spec.partition(":")
        own = [f"method.name={name}", *([f"method.preset={preset}"] if preset else []), *(settings or [])]
        runs[spec] = load_config(folder / "demo.toml", [f"federation.num_rounds={rounds}", *own])
    print_result(catchup.run(runs, [float(energy) for energy in split_words(energies)]), catchup.tables, as_json)


@app.command("families")
def families_command(
    only: Annotated[str, typer.Option(help="Families, by transformers' model types: llama,mixtral.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="The rows as the documentation has them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Every architecture that transformers loads as a causal LM: trained, exported and merged as in plain PEFT?"""
    from benchmarks import families

    result = families.run(split_words(only) or None)
    if markdown:
        print(families.to_markdown(result))
    else:
        print_result(result, families.tables, as_json)


@app.command("soak")
def soak_command(
    sites: Annotated[int, typer.Option(min=2, help="Sites.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; every one but the last has a fault.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the faults: which, whom, when.")] = 0,
    method: Annotated[str, typer.Option(help="Method.")] = "fedsrd",
    processes: Annotated[bool, typer.Option("--processes", help="With real processes, in real time.")] = False,
    folder: Annotated[Path | None, typer.Option(help="An empty folder where all of it is left.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write the page about it here.")] = None,
    as_json: AsJson = False,
) -> None:
    """A federation with a fault in every round: does it end by itself, with the right bits, everything counted once?"""
    from benchmarks.soak import processes as real
    from benchmarks.soak import report
    from benchmarks.soak.play import Size

    size = Size(sites, rounds, seed, method)
    result = real.run(size, folder) if processes else report.run(size, folder)
    if page is not None:
        page.write_text(report.page(result), encoding="utf-8")
    print_result(result, report.tables, as_json)
    if any(result["checks"].values()):
        raise typer.Exit(1)


@app.command("workers")
def workers_command(
    workers: Annotated[int, typer.Option(min=2, help="Worker processes, and flower-sim's.")] = 4,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of the demo; the first is left out.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats in turns; the median is kept.")] = 1,
    flower: Annotated[bool, typer.Option("--flower/--no-flower", help="Flower's simulation too.")] = True,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any other setting: key=value.")] = None,
    as_json: AsJson = False,
) -> None:
    """The demo one client after another, with worker processes, and on flower-sim: seconds, and the same bits?"""
    from benchmarks import workers as bench
    from fedloom.records.configfile import load_config

    config = load_config(testbed_folder() / "demo.toml", [f"federation.num_rounds={rounds}", *(settings or [])])
    print_result(bench.run(config, workers, repeats=repeats, flower=flower), bench.tables, as_json)
