"""What runs a federation in containers: nobody is root, nothing is writable but what must be, no key is in an image."""

import http.server
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fedloom.cli import main as cli
from fedloom.deploy import alive
from fedloom.deploy.containers import HOME, PROXY_PORTS, check_containers, pinned, write_containers
from fedloom.deploy.federation import FederationPlan, add_site, write_federation
from fedloom.errors import ConfigError

ASKED = FederationPlan(
    address="fed.example.org:9443", listen="127.0.0.1:8443", model="/srv/model", data="./examples/{site}.jsonl"
)
SITES = ["bank", "Old_Lab"]


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("containers") / "fed"
    write_federation(folder, ASKED, SITES)
    write_containers(folder)
    return folder


def places(fed):
    return [fed / "server", *(fed / "sites" / site for site in SITES)]


def compose(place):
    return yaml.safe_load((place / "compose.yaml").read_text())


def mounts(place, service):
    """Where it lies outside → (where inside, whether it can be written)."""
    found = {}
    for text in compose(place)["services"][service]["volumes"]:
        outside, inside, *mode = text.split(":")
        found[outside] = (inside, mode != ["ro"])
    return found


def test_every_service_is_confined(fed):
    for place in places(fed):
        for name, service in compose(place)["services"].items():
            assert int(service["user"].partition(":")[0]) > 0, name
            assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and service["tmpfs"] == ["/tmp"]
            assert service["security_opt"] == ["no-new-privileges:true"] and "privileged" not in service


def test_nothing_of_the_host_can_be_written_and_all_that_is_mounted_is_there(fed):
    for place in places(fed):
        for name in compose(place)["services"]:
            for outside, (_, writable) in mounts(place, name).items():
                assert writable == (outside in compose(place)["volumes"]), outside
                if outside.startswith("./") and not outside.startswith("./examples"):  # those the site brings itself
                    assert (place / outside).exists(), outside
        for secret in compose(place)["secrets"].values():
            assert (place / secret["file"]).stat().st_mode & 0o077 == 0


def test_a_worker_has_the_data_and_no_network_a_node_the_key_and_no_data(fed):
    for site in SITES:
        place = fed / "sites" / site
        services = compose(place)["services"]
        worker, node = mounts(place, "worker"), mounts(place, "node")
        assert services["worker"]["network_mode"] == "none" and "ports" not in services["worker"]
        assert worker[f"./examples/{site}.jsonl"] == (str(HOME / "examples" / f"{site}.jsonl"), False)
        assert worker["/srv/model"] == ("/srv/model", False)
        assert set(worker) & set(node) == {"meeting", "./SITE.toml"} and "state" not in node
        assert "secrets" not in services["worker"] and services["node"]["secrets"][0]["target"] == f"{HOME}/node.key"


def test_the_sites_http_proxy_is_the_nodes_alone_and_never_for_this_machine(fed):
    for place in places(fed):
        told = {name: service.get("environment", {}) for name, service in compose(place)["services"].items()}
        assert [name for name, values in told.items() if "HTTPS_PROXY" in values] == ["node"] * (place.name != "server")
        for values in filter(None, told.values()):
            assert values["HTTPS_PROXY"] == "${HTTPS_PROXY:-}" and "127.0.0.1" in values["NO_PROXY"]


def test_the_superlink_is_reached_through_the_proxy_alone(fed):
    services = compose(fed / "server")["services"]
    (inside,) = set(PROXY_PORTS) - {8443}  # where the SuperLink listens
    assert services["superlink"]["ports"] == [f"9443:{inside}"] and "ports" not in services["proxy"]
    assert services["proxy"]["network_mode"] == "service:superlink"
    rules = (fed / "server" / "nginx.container.conf").read_text()
    assert f"listen {inside} ssl;" in rules and "proxy_pass                    https://127.0.0.1:8443;" in rules
    assert "/v1/fleet/" in rules and "return 403;" in rules
    assert all(path.startswith(f"{HOME}/") for path in re.findall(r"\S+\.(?:pem|key)(?=;)", rules))


def test_names_of_projects_are_such_as_compose_takes(fed):
    assert [compose(place)["name"] for place in places(fed)] == ["fedloom-server", "fedloom-bank", "fedloom-old-lab"]


def test_an_image_holds_neither_keys_nor_settings(fed):
    made = fed / "containers"
    assert not [path for path in made.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    for name in (".containerignore", ".dockerignore"):
        lines = [line for line in (made / name).read_text().splitlines() if not line.startswith("#")]
        assert lines[0] == "*"
        let_in = [line.removeprefix("!") for line in lines[1:]]
        for stranger in ("node.key", "server.key", "ca.key", "SITE.toml", "run.toml", "train.jsonl", "worker.token"):
            assert not any(fnmatch(stranger, pattern) for pattern in let_in)
    text = (made / "Containerfile").read_text()
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY") and "--from" not in line]
    assert sum(copied, []) == let_in == ["constraints.txt", "fedloom-*.whl"]
    last = text.rpartition("\nFROM ")[2]
    assert int(re.search(r"^USER (\d+):\d+$", last, re.M)[1]) > 0 and "COPY --from=build" in last


def test_the_image_has_the_versions_that_are_installed_here(fed):
    lines = (fed / "containers" / "constraints.txt").read_text().splitlines()
    assert lines == pinned() and all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", line) for line in lines)
    names = {line.partition("==")[0] for line in lines}
    assert {"torch", "transformers", "flwr", "numba", "cryptography", "httpx"} <= names
    assert not names & {"fedloom", "pytest", "mkdocs", "trl"}


def test_values_name_all_that_the_charts_read(fed):
    for chart, place in (("server", fed / "server"), ("site", fed / "sites" / "bank")):
        values = yaml.safe_load((place / "values.yaml").read_text())
        folder = fed / "containers" / "charts" / chart / "templates"
        asked = set(re.findall(r"\.Values\.([A-Za-z.]+)", "".join(path.read_text() for path in folder.iterdir())))
        for path in asked:
            held = values
            for key in path.split("."):
                assert key in held, f"{chart}: {path}"
                held = held[key]
        text = (place / "values.yaml").read_text()
        assert "PRIVATE" not in text and "create secret generic" in text


def rendered(fed, chart, tmp_path):
    place = fed / "server" if chart == "server" else fed / "sites" / "bank"
    command = ["helm", "template", "here", str(fed / "containers" / "charts" / chart), "--values"]
    command += [str(place / "values.yaml"), "--set", "model.claim=m", "--set", "data.claim=d"]
    text = subprocess.run(
        command, check=True, capture_output=True, text=True, env={"HOME": str(tmp_path), "PATH": HELM}
    )
    return [document for document in yaml.safe_load_all(text.stdout) if document]


HELM = str(Path(shutil.which("helm") or "").parent)


@pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not installed")
@pytest.mark.parametrize("chart", ["server", "site"])
def test_the_charts_as_helm_renders_them_confine_every_pod(fed, chart, tmp_path):
    documents = rendered(fed, chart, tmp_path)
    pods = {held["metadata"]["name"]: held["spec"]["template"] for held in documents if held["kind"] == "Deployment"}
    for template in pods.values():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            held = container["securityContext"]
            assert held["readOnlyRootFilesystem"] and not held["allowPrivilegeEscalation"]
            assert held["capabilities"] == {"drop": ["ALL"]}
    rules = [held["spec"] for held in documents if held["kind"] == "NetworkPolicy"]
    for template in pods.values():
        labels = template["metadata"]["labels"].items()
        (rule,) = [rule for rule in rules if rule["podSelector"]["matchLabels"].items() <= labels]
        assert rule["policyTypes"] == ["Ingress", "Egress"]
        assert bool(rule["egress"]) == (labels >= {("app.kubernetes.io/component", "node")})
        assert bool(rule["ingress"]) == (chart == "server")
    assert not [held for held in documents if held["kind"] == "Secret"]


def test_the_charts_say_so_without_helm(fed):
    for chart, open_ways in (("server", 0), ("site", 1)):
        folder = fed / "containers" / "charts" / chart
        text = "".join(path.read_text() for path in sorted((folder / "templates").iterdir()))
        containers = len(re.findall(r"^ +image: ", text, re.M))
        assert text.count('include "confined"') == containers == 2
        assert text.count('include "pod"') == text.count("kind: Deployment")
        policies = text.count("kind: NetworkPolicy")
        assert text.count("policyTypes: [Ingress, Egress]") == policies == open_ways + 1
        assert text.count("egress: []") == policies - open_ways
        for line in ("runAsNonRoot: true", "readOnlyRootFilesystem: true", "capabilities: {drop: [ALL]}"):
            assert line in text
        assert yaml.safe_load((folder / "Chart.yaml").read_text())["apiVersion"] == "v2"


@pytest.mark.parametrize(
    ("asked", "word"),
    [({"listen": "0.0.0.0:8000"}, "--listen"), ({"model": "/srv/a:b"}, "--model"), ({"data": "$HOME/x"}, "--data")],
)
def test_what_cannot_run_in_containers_is_refused_before_anything_is_written(asked, word, tmp_path):
    with pytest.raises(ConfigError, match=word):
        check_containers(ASKED.model_copy(update=asked))
    option = {"listen": "127.0.0.1:8000", "model": "/srv/m", "data": "./d", **asked}
    command = ["federation", "init", str(tmp_path / "fed"), "--address", "h:9443", "--site", "a", "--containers"]
    for name, value in option.items():
        command += [f"--{name}", value]
    assert CliRunner().invoke(cli.app, command).exit_code == 2 and not (tmp_path / "fed").exists()


def test_a_site_that_comes_later_has_its_files_too_and_plain_federations_have_none(tmp_path):
    for extra in ([], ["--containers"]):
        folder = tmp_path / f"fed{len(extra)}"
        command = ["federation", "init", str(folder), "--address", "h:9443", "--site", "a", *extra]
        assert CliRunner().invoke(cli.app, command).exit_code == 0
        assert CliRunner().invoke(cli.app, ["federation", "add", str(folder), "b"]).exit_code == 0
        for place in (folder / "containers", *(folder / f"sites/{site}/compose.yaml" for site in "ab")):
            assert place.exists() == bool(extra)
    add_site(folder, "c")
    assert (folder / "sites" / "c").is_dir()


def test_a_worker_that_listens_is_alive_and_one_that_does_not_is_not(tmp_path, capsys):
    (tmp_path / "SITE.toml").write_text('socket = "./s"\n')
    assert alive.main([str(tmp_path)]) == 1 and "nothing answers" in capsys.readouterr().err
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        assert alive.main([str(tmp_path)]) == 0 and "the worker" in capsys.readouterr().out
    assert alive.main([str(tmp_path)]) == 1
    assert alive.main([str(tmp_path / "nowhere")]) == 1


@pytest.mark.parametrize("status", [200, 503])
def test_a_superlink_is_asked_over_tls_whether_it_is_well(fed, status, tmp_path):
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Health)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(fed / "server" / "server.pem", fed / "server" / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        shutil.copy(fed / "server" / "ca.pem", tmp_path)
        (tmp_path / "federation.toml").write_text(f"listen = {json.dumps(f'127.0.0.1:{server.server_address[1]}')}\n")
        assert alive.main([str(tmp_path)]) == (0 if status == 200 else 1)
    finally:
        server.shutdown()
        server.server_close()
