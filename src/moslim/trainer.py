"""The Trainer behind the command line: Lightning's, with ``generate`` and ``export``."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from moslim.restore import restore


class MoslimTrainer(Trainer):
    """Lightning's Trainer with two more commands."""

    def generate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        question: str = "",
        levels: dict[str, int] | None = None,
        samples: int = 1,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> list[str]:
        """Prints a policy's answers to one question.

        Args:
            model: A module with ``answer(question, levels, samples)``.
            datamodule: Source of the instruction that puts the levels into the prompt.
            question: The question.
            levels: Wanted level (0 = lowest) by dimension name, e.g. ``{warmth: 4}``; none for an ordinary answer.
            samples: Number of answers.
            ckpt_path: Checkpoint, or ``last``; without it the policy answers as it is before training.
            weights_only: Accepted so that a saved ``fit`` config can be used; loading is always weights-only.

        Raises:
            TypeError: The module cannot answer.
            ValueError: There is no question.
        """
        answer = _method(model, "answer")
        if not question.strip():
            raise ValueError("generate needs a question: --question 'How do I make tea?'")
        self._attach(model, datamodule, ckpt_path)
        answers: list[str] = answer(question, levels or {}, samples)
        print("\n\n".join(answers))
        return answers

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        out: str = "export",
        form: Literal["merged", "adapter"] = "merged",
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Writes a trained model as a Hugging Face folder.

        Args:
            model: A module with ``export(folder)``, or ``export_adapter(folder)`` for that form.
            datamodule: Source of the instruction, for modules that export it.
            out: The folder to write.
            form: ``merged``, a model that needs nothing else; or ``adapter``, which of a model trained with LoRA holds
                what training changed, and needs the base model.
            ckpt_path: Checkpoint, or ``last``.
            weights_only: Accepted so that a saved ``fit`` config can be used; loading is always weights-only.

        Raises:
            TypeError: The module cannot be exported.
            ValueError: No checkpoint is named.
        """
        export = _method(model, "export" if form == "merged" else "export_adapter")
        if ckpt_path is None:
            raise ValueError("export needs a trained model: --ckpt_path last, or a file")
        self._attach(model, datamodule, ckpt_path)
        export(out)
        print(f"exported to {out}")

    def _attach(self, model: LightningModule, datamodule: LightningDataModule | None, ckpt_path: str | None) -> None:
        """Connects module and data as a loop would, and restores the checkpoint."""
        self.strategy.connect(model)
        model.trainer = self
        if datamodule is not None:
            self.datamodule, datamodule.trainer = datamodule, self
        model.configure_model()
        if ckpt_path is not None:
            restore(self, model, ckpt_path)
        model.to(self.strategy.root_device).eval()


def _method(model: LightningModule, name: str) -> Any:
    method = getattr(model, name, None)
    if not callable(method):
        raise TypeError(f"{type(model).__name__} has no method `{name}`; give a model that has one with --model")
    return method
