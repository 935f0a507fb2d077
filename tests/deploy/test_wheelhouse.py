"""What pip is asked for, what its failures mean, and that nothing is missing on the site's machine."""

import platform
import sys
import zipfile
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from fedloom.deploy import wheelhouse
from fedloom.deploy.containers import pinned
from fedloom.deploy.platforms import Target, parse_targets
from fedloom.deploy.wheelhouse import Asked, fill_wheelhouse, list_missing, unpacked_bytes
from fedloom.errors import ConfigError
from tiny_wheels import StandIn, make_fedloom, make_wheel

LINUX, ARM, MAC = (
    Target(*told, 12)
    for told in (("Linux", "x86_64", (2, 28)), ("Linux", "aarch64", (2, 28)), ("Darwin", "arm64", (14, 0)))
)


@pytest.fixture
def pip(tmp_path, monkeypatch):
    def stand_in(*wheels, **more):
        made = StandIn(tmp_path / "pip", wheels, **more)
        monkeypatch.setattr(wheelhouse, "PIP", made.command)
        monkeypatch.setattr(wheelhouse, "pinned", lambda extras: ["helper==1"])  # the true ones take half a second
        return made

    return stand_in


def test_platforms_are_taken_by_name_and_by_tag():
    assert parse_targets(["linux-x86_64", "manylinux_2_28_x86_64"], ["3.12"]) == [LINUX]
    assert parse_targets(["linux-aarch64", "macos-arm64"], ["3.12"]) == [ARM, MAC]
    assert len(parse_targets(["linux-x86_64", "macos-arm64"], ["3.11", "3.12"])) == 4
    (here,) = parse_targets([], [])
    assert (here.system, here.machine, here.python) == (platform.system(), platform.machine(), sys.version_info[1])


@pytest.mark.parametrize(
    ("platforms", "pythons"),
    [(["win_amd64"], []), (["musllinux_1_2_x86_64"], []), (["linux"], []), ([], ["3.10"]), ([], ["2.7"]), ([], ["3"])],
)
def test_an_unknown_platform_or_python_is_refused(platforms, pythons):
    with pytest.raises(ConfigError, match="--platform|--python"):
        parse_targets(platforms, pythons)


def test_pip_is_told_every_platform_that_runs_there_and_no_newer_one():
    options = LINUX.pip_options()
    told = [option.removeprefix("--platform=") for option in options if option.startswith("--platform=")]
    assert told[0] == "manylinux_2_28_x86_64" and "manylinux_2_29_x86_64" not in told
    assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64", "linux_x86_64"} <= set(told)
    assert options[-3:] == ["--python-version=3.12", "--implementation=cp", "--abi=cp312"]
    assert "macosx_11_0_arm64" in MAC.platform_tags() and "macosx_15_0_arm64" not in MAC.platform_tags()


def test_the_versions_are_those_that_are_installed_here_and_only_wheels_are_taken(tmp_path, pip):
    made = tmp_path / "made"
    own = make_fedloom(made, ["arms ; extra == 'privacy'", "legs ; extra == 'eval'"])
    wheels = [own, *(make_wheel(made, "arms", tag=f"cp312-cp312-manylinux_2_28_{m}") for m in ("x86_64", "aarch64"))]
    fetched = pip(*wheels)
    asked = Asked((LINUX, ARM), ("fast", "flower", "privacy"), ("--index-url=https://wheels.example.org/simple",))
    filled = fill_wheelhouse(tmp_path / "store", asked)
    assert sorted(path.name for path in filled.iterdir()) == sorted(wheel.name for wheel in wheels)
    (call,) = fetched.calls("download")  # the stand-in hands out both at once
    assert {"--only-binary=:all:", "--no-deps", *asked.pip, *LINUX.pip_options()} <= set(call) and call[-1] == "arms"
    assert f"torch=={metadata.version('torch').partition('+')[0]}" in pinned(asked.extras)


def test_what_is_there_is_not_fetched_again_and_another_platform_is(tmp_path, pip):
    fetched = pip(make_fedloom(tmp_path / "made", ["helper"]), make_wheel(tmp_path / "made", "helper"))
    store = tmp_path / "store"
    first = fill_wheelhouse(store, Asked((LINUX,)))
    assert fill_wheelhouse(store, Asked((LINUX,))) == first
    (call,) = fetched.calls("download")
    assert call[-1] == "helper==1"
    assert fill_wheelhouse(store, Asked((ARM,))) != first and len(fetched.calls("download")) == 2


def test_conditions_are_those_of_the_sites_machine(tmp_path, pip):
    """pip reads them as if they were about the machine that it runs on."""
    made = tmp_path / "made"
    conditions = "sys_platform == 'darwin' and platform_machine == 'arm64'"
    own = make_fedloom(made, [f"onlymac>=2 ; {conditions}", "plain", "onlylinux ; sys_platform == 'linux'"])
    onlymac = make_wheel(made, "onlymac", "2", ["deeper[fast] ; platform_machine == 'arm64'"])
    deeper = make_wheel(made, "deeper", requires=["deepest ; extra == 'fast'"])
    wheels = [own, onlymac, make_wheel(made, "plain"), deeper, make_wheel(made, "deepest")]
    fetched = pip(*wheels, make_wheel(made, "onlylinux"))
    filled = fill_wheelhouse(tmp_path / "store", Asked((MAC,)))
    assert {path.name for path in filled.iterdir()} == {wheel.name for wheel in wheels}
    passes = [call[call.index("--dest") + 2 :] for call in fetched.calls("download")]
    assert passes == [["onlymac>=2", "plain"], ["deeper"], ["deepest"]]
    pip(own, make_wheel(made, "plain"))
    with pytest.raises(ConfigError, match="did not fetch onlymac>=2"):
        fill_wheelhouse(tmp_path / "other", Asked((MAC,)))


def test_a_wheel_for_another_machine_or_version_counts_as_missing(tmp_path):
    made = tmp_path / "made"
    own = make_fedloom(made, ["fits>=2", "extra ; extra == 'fast'"])
    other = make_wheel(made, "fits", "2", tag="cp312-cp312-manylinux_2_28_aarch64")
    old = make_wheel(made, "fits", "1")
    wanted = Requirement("fedloom[fast]")
    assert {str(one) for one in list_missing([own, other, old], wanted, LINUX)} == {"fits>=2", 'extra; extra == "fast"'}
    assert [one.name for one in list_missing([own, other], wanted, ARM)] == ["extra"]
    assert unpacked_bytes([old]) == 4096 * sum(member.file_size > 0 for member in zipfile.ZipFile(old).infolist())


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (
            "WARNING: Retrying after NewConnectionError\nERROR: No matching distribution found for torch",
            "no package index",
        ),
        ("ERROR: No matching distribution found for numba==0.68.1", "no index here has such a wheel"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: Cannot install x\nERROR: ResolutionImpossible: see resolution", "such a wheel: name one"),
        ("/usr/bin/python3: No module named pip", "this Python has no pip"),
        ("ERROR: something else", "see what pip says. pip said: something else"),
        ("", "pip said: nothing"),
    ],
)
def test_pips_failures_are_told_in_plain_words(tmp_path, pip, said, meant):
    pip(stderr=said or "\n")
    with pytest.raises(ConfigError, match="pip could not fetch wheels for fedloom's own wheel") as told:
        fill_wheelhouse(tmp_path / "store", Asked((LINUX,)))
    assert meant in str(told.value) and "\n" not in str(told.value)


def test_an_installed_fedloom_is_packed_again_as_it_was(tmp_path):
    place = tmp_path / "site-packages"
    info = place / "fedloom-9.dist-info"
    files = {"METADATA": "Name: fedloom\nVersion: 9\n", "WHEEL": "Wheel-Version: 1.0\n", "INSTALLER": "pip\n"}
    files |= {"entry_points.txt": "[console_scripts]\n", "licenses/LICENSE": "words\n", "direct_url.json": "{}"}
    (info / "licenses").mkdir(parents=True)
    (place / "fedloom" / "__pycache__").mkdir(parents=True)
    (place / "fedloom" / "__init__.py").write_text("")
    (place / "fedloom" / "__pycache__" / "x.pyc").write_text("")
    for name, text in files.items():
        (info / name).write_text(text)
    (info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in files) + "../../bin/fedloom,,\n")
    installed = metadata.Distribution.at(info)
    made = [wheelhouse._pack_installed(place / "fedloom", installed, into) for into in (tmp_path, place)]
    assert made[0].read_bytes() == made[1].read_bytes()
    opened = zipfile.ZipFile(made[0])
    inside = ["METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE", "RECORD"]
    assert sorted(opened.namelist()) == sorted(["fedloom/__init__.py", *(f"{info.name}/{name}" for name in inside)])
    assert len(opened.read(f"{info.name}/RECORD").splitlines()) == 6
    (info / "WHEEL").unlink()
    (info / "RECORD").unlink()
    with pytest.raises(ConfigError, match="tells no files"):
        wheelhouse._pack_installed(place / "fedloom", metadata.Distribution.at(info), tmp_path)
