"""What docs/deployment.md shows is run, in its order, on this machine."""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from tests.deployment.forks import Forks
from tests.deployment.processes import ROOT, answers, free_port, wait_for

TEXT = (ROOT / "docs" / "deployment.md").read_text()
STOCK = "Flower's own way"
SECTIONS = ["On one machine", "Two laptops on one desk", "Hospitals", STOCK]


def section(name: str) -> str:
    return TEXT.split(f"\n## {name}\n", 1)[1].split("\n## ", 1)[0]


def commands(text: str, port: int, folder: Path) -> list[str]:
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines()
    return [for_this_machine(line, port, folder) for line in lines]


def for_this_machine(text: str, port: int, folder: Path) -> str:
    listens = text.startswith("flower-superlink")
    for name in ("192.168.1.10", "fl.example.org"):
        here = "127.0.0.1" if listens or name[0] == "1" else "localhost"
        text = text.replace(f"{name}:8000", f"{here}:{port}").replace(name, here)
    text = re.sub("--port [0-9]+", lambda _: f"--port {free_port()}", text).replace("/home/federation", str(folder))
    return text.replace("flower-superlink", f"flower-superlink --port {port}") if listens else text


def test_every_command_stands_in_a_section_that_is_run():
    assert TEXT.count("```bash") == sum(section(name).count("```bash") for name in SECTIONS)


def test_the_apps_that_are_shown_are_those_of_the_script():
    script = (ROOT / "examples" / "deployment" / "train.py").read_text()
    [shown] = re.findall(r"```python\n(.*?)```", section(STOCK), re.S)
    assert all(part.strip() in script for part in shown.split("\n\n\n"))


def assert_as_in_one_process(checkpoint: Path) -> None:
    """A checkpoint of the script's run after one round has the weights that the script gives alone, bit for bit."""
    script = runpy.run_path(str(ROOT / "examples" / "deployment" / "train.py"))
    model, trainer = script["federation"](max_rounds=1, default_root_dir=str(checkpoint.parents[2] / "alone"))
    trainer.fit(model, val_dataloaders=script["validation"]())
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state.keys() == model.state_dict().keys()
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])] == []


@pytest.mark.landing
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SECTIONS)
def test_commands(name, tmp_path):
    for file in ("train.py", "make_keys.py", "pyproject.toml"):
        shutil.copy(ROOT / "examples" / "deployment" / file, tmp_path)
    port = 8000 if name == "On one machine" else free_port()
    if answers(port):
        pytest.skip("something else listens at port 8000")
    for content in re.findall(r"```toml\n(.*?)```", section(name), re.S):
        (tmp_path / "config.toml").write_text(for_this_machine(content, port, tmp_path))
    scripts, running, said = Forks(tmp_path), [], ""
    try:
        for number, command in enumerate(commands(section(name), port, tmp_path)):
            words = shlex.split(command.removesuffix(" &"))
            if words[0] == "export":
                continue  # what no process of these tests goes without
            script = scripts.start(words, str(number))
            if command.endswith(" &"):
                running.append(script)
                if words[0] == "flower-superlink":
                    wait_for(lambda: answers(port), what=command)
                continue
            done, said = script.process.wait(800), script.log
            assert done == 0, (command, said, {one.log_path.name: one.log[-2000:] for one in running})
        assert re.search(rf"accuracy 0\.\d+ after {1 if name == STOCK else 5} rounds", said), said
        if name == STOCK:
            assert f"checkpoints in {tmp_path}/results/checkpoints." in said
            assert_as_in_one_process(tmp_path / "results" / "checkpoints" / "last.ckpt")
        assert all(script.process.poll() is None for script in running)
    finally:
        scripts.end()
    assert not answers(port)
