"""No secret of the settings is printed, stored, said or reported, whatever it is called and wherever it stands."""

import json
import subprocess
import sys

import pytest
from launching import ROOT

from lingshu_rl.failures import ConfigError
from lingshu_rl.planning.given import load_config
from lingshu_rl.processes.pool import Pool
from lingshu_rl.report import write_report
from lingshu_rl.rollout.client import served_context
from lingshu_rl.settings import to_yaml
from lingshu_rl.storage.runfolder import RunFolder
from lingshu_rl.text.hiding import HIDDEN, is_secret, setting_shown, shown, url_fault, without_secrets

S = "s3cr3t-Value"
NAMES = ["HF_TOKEN", "hf_token", "api_key", "apiKey", "OPENAI_API_KEY", "password", "DB_PASSWD", "clientSecret", "X-Auth-Token",
         "AWS_SECRET_ACCESS_KEY", "private_key", "Authorization", "session_key", "credentials", "WANDB_API_KEY", "GITHUB_PAT", "accessKey", "ssh_key", "Cookie"]  # fmt: skip
PLAIN = ["token_ids", "max_tokens", "tokenizer", "key", "image_key", "sort_keys", "keyboard", "author", "seed", "keep_best", "monkey", "stop_tokens", "authority", "path"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_secret_is_known_by_its_name_in_any_spelling(name):
    assert is_secret(name)
    for tree in ({name: S}, {"a": [{"b": {name: S}}]}, {name: [S, S]}, {"env": {name: S}}):
        assert S not in json.dumps(without_secrets(tree))
    assert S not in setting_shown(f"rewards.spec.args.{name}={S}")
    assert S not in setting_shown(f"rewards.spec={{args: {{{name}: {S}}}}}")


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_no_secret_is_shown(name):
    tree = {name: "liver", "n": 3, "list": [1, "two"], "flag": True, "none": None, "empty": ""}
    assert name == "token_ids" or without_secrets(tree) == tree
    assert without_secrets({name: 12}) == {name: 12}


@pytest.mark.parametrize("name", ["MY_THING", "HTTPS_PROXY", "PIN", "x", "VLLM_API_KEY", "NCCL_SECRET", "HF_HUB_TOKEN"])
def test_of_an_environment_only_what_tunes_engines_is_shown(name):
    for value in (S, 4711):
        assert without_secrets({"rollout": {"env": {name: value}}}) == {"rollout": {"env": {name: HIDDEN}}}
    assert S not in setting_shown(f"rollout.env.{name}={S}") and S not in setting_shown(f"rollout.env={{{name}: {S}}}")
    tuning = {"rollout": {"env": {"VLLM_CPU_KVCACHE_SPACE": "4", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": 2}}}
    assert without_secrets(tuning) == tuning


@pytest.mark.parametrize(
    "text",
    [
        f"http://me:{S}@host:8000/v1", f"https://host/x?sig={S}&y=1", f"s3://u:{S}@bucket/rows", f"git+https://{S}@github.com/x",
        f"see http://me:{S}@host, and again", "sk-proj-abcdefghijklmnop123", "hf_abcdefghijklmnopqrs", "ghp_abcdefghijklmnop1234",
        "AKIAABCDEFGHIJKLMNOP", "Authorization: Bearer abcdefgh12345", "eyJhbGciOiJI.eyJzdWIiOiIx.abc_def", "glpat-abcdefghijklmnop",
    ],
)  # fmt: skip
def test_a_secret_is_known_by_its_look(text):
    told = shown(text)
    assert HIDDEN in told and S not in told and "abcdefgh" not in told.replace("ABCDEFGH", "abcdefgh")
    assert without_secrets({"path": text}) == {"path": told}


def test_ordinary_texts_and_addresses_stay():
    for text in (
        "http://127.0.0.1:8000/v1",
        "meta-llama/Llama-3",
        "/data/rows.jsonl:train",
        "task_key",
        "What is it?",
        "a@b.org",
    ):
        assert shown(text) == text and without_secrets({"path": text}) == {"path": text}


SETTINGS = [
    f"rollout.env.HF_TOKEN={S}", f"rollout.env.PLAIN_NAME={S}", "rollout.env.VLLM_CPU_KVCACHE_SPACE=4",
    f"rollout.ray={{runtime_env: {{env_vars: {{X: {S}}}}}}}", "cluster=ray",
    f"rewards.spec={{class: 'rewards:YesNo', args: {{api_key: {S}}}}}", f"deepspeed.wandb.password={S}",
]  # fmt: skip


def test_neither_dry_run_nor_config_nor_report_nor_complaint_holds_a_secret(tmp_path):
    done = subprocess.run([sys.executable, "-m", "lingshu_rl.cli", "train", "--dry-run", *SETTINGS, f"run.dir={tmp_path}/dry"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert S not in done.stdout + done.stderr and "HF_TOKEN: (hidden)" in done.stdout
    assert "VLLM_CPU_KVCACHE_SPACE: '4'" in done.stdout
    config = load_config(None, [*SETTINGS, f"run.dir={tmp_path}/run"])
    assert config.rollout.env["HF_TOKEN"] == S  # the run itself has it
    folder = RunFolder(config.run.dir)
    folder.begin(config, 0)
    folder.log_metrics({"step": 1, "reward/mean": 0.5, "reward/std": 0.1})
    write_report(folder.path)
    for file in (f for f in folder.path.rglob("*") if f.is_file()):
        assert S.encode() not in file.read_bytes(), file
    folder.save_checkpoint(1, {"step": 1}, lambda p: None, is_main=True, barrier=lambda: None, keep_last=1)
    assert folder.open(load_config(None, [*SETTINGS, f"run.dir={tmp_path}/run"])) is not None  # the same run
    (folder.path / "config.yaml").write_text(to_yaml(config).replace(f"PLAIN_NAME: {HIDDEN}", f"PLAIN_NAME: {S}"))
    with pytest.raises(ConfigError, match=r"train\.lr") as told:  # a folder of before secrets were hidden
        folder.open(load_config(None, [*SETTINGS, f"run.dir={tmp_path}/run", "train.lr=0.5"]))
    assert S not in str(told.value) and "rollout.env" not in str(told.value)


@pytest.mark.parametrize(
    "setting",
    [f"rolout.env.HF_TOKEN={S}", f"rollout.env.HF_TOKEN=[{S}", f"rewards.spec={{api_key: {S}",
     f"rollout.urls=[http://me:{S}@host:1]", f"reference.urls=[http://host:1/?token={S}]", f"rollout.urls=[ftp://x/{S}]",
     f"rollout.vllm.api_key={S}", f"rollout.vllm.api_key=[{S}]", f"train.lr.password={S}"],
)  # fmt: skip
def test_a_setting_that_cannot_be_used_is_named_without_its_secret(setting):
    with pytest.raises(ConfigError, match=r"rol?lout|reference|rewards|train") as told:
        load_config(None, [setting])
    assert S not in str(told.value)


def test_a_file_that_is_no_yaml_is_named_by_its_line_and_not_by_its_words(tmp_path):
    (tmp_path / "config.yaml").write_text(f"seed: 1\nrollout: {{env: {{A: {S}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml is not readable YAML: .*\(line 3") as told:
        load_config(tmp_path / "config.yaml")
    assert S not in str(told.value)


def test_settings_that_were_stored_hidden_do_not_start_a_run(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(None, SETTINGS[:1])))
    with pytest.raises(ConfigError, match=r"rollout\.env\.HF_TOKEN was hidden .* give it again"):
        load_config(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", SETTINGS[:1]).rollout.env["HF_TOKEN"] == S


@pytest.mark.parametrize("url", ["http://node2:8100", "https://a.b.org/v1", "http://[::1]:80", "http://127.0.0.1:1/x/"])
def test_addresses_of_servers_are_plain(url):
    assert url_fault(url) == ""


@pytest.mark.parametrize("url", ["", "node2:8100", "http://", "http://a@b", "http://:x@b", "http://b?x", "http://b#x", "http://b:99999", "file:///etc"])  # fmt: skip
def test_others_are_refused(url):
    assert url_fault(url)


def test_the_token_passes_no_proxy_and_follows_no_redirect(monkeypatch):
    """Proxies of the environment would read it; a redirect would take it to another host."""
    import asyncio
    import http.server
    import threading

    heard = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append((self.path, self.headers["authorization"]))
            if self.path.startswith("/v1/"):
                self.send_response(307)
                self.send_header("location", f"http://127.0.0.2:{self.server.server_address[1]}/other")
            else:
                self.send_response(200)
            self.end_headers()

        do_POST = do_CONNECT = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.3:{port}")
    with pytest.raises(RuntimeError, match="307"):
        served_context([f"http://127.0.0.1:{port}"], "t0ken")

    async def ask():
        pool = Pool("rollout", [f"http://127.0.0.1:{port}"], token="t0ken", timeout_s=5, retries=0, error=RuntimeError)
        with pytest.raises(RuntimeError, match="307"):
            await pool.post_to(pool.servers, "/v1/x")
        await pool.close()

    asyncio.run(ask())
    server.shutdown()
    assert heard == [("/v1/models", "Bearer t0ken"), ("/v1/x", "Bearer t0ken")]
