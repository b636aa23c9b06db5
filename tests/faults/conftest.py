import warnings

import pytest

from diffusion_model.cli import sample_command, train_command


class Command:
    "The commands in this process: exit code, and what they print."
    def __init__(self, capsys): self.capsys = capsys

    def __call__(self, command, argv):
        self.capsys.readouterr()
        self.code = command([str(a) for a in argv])
        self.out, self.err = self.capsys.readouterr()
        assert "Traceback" not in self.err
        return self

    def train(self, *argv): return self(train_command, argv)
    def sample(self, *argv): return self(sample_command, argv)

    def says(self, code, *parts):
        "The exit code, and that all of these words are in the complaint."
        assert self.code == code, self.err
        for part in parts: assert str(part) in self.err, (part, self.err)


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the commands set their own
    return Command(capsys)
