"""`fedloom federation bundle`, and what `--bundle` does in `init` and `add`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.options import say
from fedloom.errors import ConfigError

if TYPE_CHECKING:
    from fedloom.deploy.wheelhouse import Asked

Bundled = Annotated[
    bool, typer.Option("--bundle", help="For each site, all that it installs without a network (federation bundle).")
]
Platforms = Annotated[
    list[str] | None,
    typer.Option(
        "--platform",
        help="Machine of a bundle: linux-x86_64, linux-aarch64, macos-arm64, or a tag of wheels; this one's, if left "
        "out. Repeatable: wheels for all of them.",
    ),
]


def bundle(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the federation, with sites/.")],
    sites: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Sites; all, if left out.")] = None,
    platform: Platforms = None,
    python: Annotated[
        list[str] | None, typer.Option(help="Version of the sites' Python: 3.11. This one's, if left out. Repeatable.")
    ] = None,
    model: Annotated[str, typer.Option(help="Base model whose files go into the bundle: a folder or Hub name.")] = "",
    extra: Annotated[list[str] | None, typer.Option(help="A further extra of fedloom: privacy. Repeatable.")] = None,
    index_url: Annotated[str, typer.Option(help="Index of packages, in place of pip's own.")] = "",
    extra_index_url: Annotated[list[str] | None, typer.Option(help="A further index. Repeatable.")] = None,
    find_links: Annotated[list[str] | None, typer.Option(help="A folder or page with wheels. Repeatable.")] = None,
) -> None:
    """Put all that a site installs without a network into one folder: DIR/bundles/NAME."""
    options = [f"--index-url={index_url}"] if index_url else []
    options += [f"--extra-index-url={url}" for url in extra_index_url or ()]
    options += [f"--find-links={place}" for place in find_links or ()]
    write_bundles(folder, sites or (), ask(platform, python, extra, options), model)


def ask(
    platform: Sequence[str] | None,
    python: Sequence[str] | None = None,
    extra: Sequence[str] | None = None,
    pip: Sequence[str] = (),
) -> Asked:
    """What bundles are to hold, as options say it. Raises ConfigError for a platform or version that is none."""
    from fedloom.deploy import containers, platforms, wheelhouse

    extras = tuple(dict.fromkeys([*containers.EXTRAS, *(extra or ())]))
    return wheelhouse.Asked(tuple(platforms.parse_targets(platform or (), python or ())), extras, tuple(pip))


def write_bundles(folder: Path, sites: Sequence[str], asked: Asked, model: str = "") -> None:
    """Make bundles, and say what is to be done with them."""
    from fedloom.deploy import bundle, platforms

    say(f"fetching wheels for {platforms.joined(asked.targets)}: minutes, where they are not here already")
    for made in bundle.write_bundles(folder, sites, asked, model):
        say(f"wrote {made.folder} ({made.bytes / 1e6:.0f} MB); SHA-256 of its {bundle.SUMS}: {made.digest}")
    say(
        f"carry each to its site, and tell it that digest on another way; there: ./install.sh ({folder} keeps the keys)"
    )


def write_first_bundles(folder: Path, sites: Sequence[str], asked: Asked) -> None:
    """The same where the sites' files were written just now. Raises ConfigError, with how to go on."""
    try:
        write_bundles(folder, sites, asked)
    except ConfigError as error:
        raise ConfigError(
            f"the sites' files are written, their bundles are not: {error}; then: fedloom federation bundle {folder}"
        ) from None
