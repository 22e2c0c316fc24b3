"""Tiny Shakespeare by speaker, for language models of characters. Nothing in here is federated.

1.1 MB of plays in which each speech begins with a line ``NAME:``. Who speaks makes clients that are there by nature::

    data = ShakespeareData("data")
    trainer = FederatedTrainer(max_rounds=10, callbacks=[Partition(by="speaker")])
    trainer.fit(model, datamodule=data)
"""

import re
import urllib.error
import urllib.request
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def words_of_speakers(text):
    """Return all that each speaker says, by name, one speech after the other.

    A line ``NAME:`` at the beginning or after an empty line begins a speech.
    """
    speeches, speaker, begins = {}, None, True
    for line in text.split("\n"):
        if begins and (name := re.fullmatch(r"([^:]+):", line)):
            speaker = name[1]
            speeches.setdefault(speaker, []).append([])
        elif speaker is not None:
            speeches[speaker][-1].append(line)
        begins = not line
    return {speaker: "\n".join("\n".join(lines).strip() for lines in own) for speaker, own in speeches.items()}


class Passages(TensorDataset):
    """Passages of a number of characters, each with the same one character later: x and y, (context,) int64.

    Args:
        words: What each speaker says.
        alphabet: All characters; a character is its place among them.
        context: The characters of a passage. What a speaker says is cut into as many as there are, without overlap.

    Attributes:
        speaker: Who says each passage, for ``Partition(by="speaker")``.
    """

    def __init__(self, words, alphabet, context):
        number = {character: i for i, character in enumerate(alphabet)}
        x, y, self.speaker = [], [], []
        for speaker, text in words.items():
            said = torch.tensor([number[character] for character in text])
            count = (len(said) - 1) // context
            x.append(said[: count * context].view(count, context))
            y.append(said[1 : count * context + 1].view(count, context))
            self.speaker += [speaker] * count
        super().__init__(torch.cat(x), torch.cat(y))


class ShakespeareData(L.LightningDataModule):
    """The speakers that say most: the last tenth of what each says is for validation, all else for training.

    Args:
        data_dir: Has ``shakespeare/input.txt``, or gets it.
        min_characters: Speakers who say less are left out: 141 of 309 say at least 1,000 characters, 64 at least 5,000.
        context: The characters of a passage.
        batch_size: The passages of a batch.
        speakers: Which of them, in the order in which they first speak, which is that of the plays: a slice.

    Attributes:
        alphabet: All characters of the text, 65.
    """

    def __init__(self, data_dir, min_characters=1000, context=64, batch_size=12, speakers=slice(None)):
        super().__init__()
        self.path = Path(data_dir) / "shakespeare" / "input.txt"
        self.min_characters, self.context, self.batch_size = min_characters, context, batch_size
        self.speakers = speakers

    def prepare_data(self):
        if self.path.exists():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")  # a download that is broken off must not look like the text
        try:
            urllib.request.urlretrieve(URL, part)
        except urllib.error.URLError as error:
            raise FileNotFoundError(
                f"{self.path} is not there, and {URL} cannot be read ({error}). Put it there, or name the folder"
                " that has shakespeare/input.txt (--data-dir)."
            ) from None
        part.rename(self.path)

    def setup(self, stage):
        text = self.path.read_text()
        self.alphabet = sorted(set(text))
        said = [(name, own) for name, own in words_of_speakers(text).items() if len(own) >= self.min_characters]
        words = dict(said[self.speakers])
        train = {speaker: own[: len(own) * 9 // 10] for speaker, own in words.items()}
        val = {speaker: own[len(own) * 9 // 10 :] for speaker, own in words.items()}
        self.train, self.val = (Passages(part, self.alphabet, self.context) for part in (train, val))

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=100)
