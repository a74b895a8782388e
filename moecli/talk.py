"""Knows one talk with a model: conversation, KV cache, sampling, what the last answer cost.

Knows no commands; what a person types is read elsewhere.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moecli.answering import StreamWriter, stream_answer
from moecli.chat import Conversation
from moecli.config import SamplingConfig
from moecli.errors import MoecliError
from moecli.events import Finished, FinishReason, GenerationStats
from moecli.terminal import say

if TYPE_CHECKING:
    from moecli.engine import Engine
    from moecli.session import Session
    from moecli.vision.picture import Picture, PictureReader

_WHY: dict[FinishReason, str] = {
    "cancelled": "stopped",
    "length": "`max_tokens` were thought",
    "context": "the context was full",
}


class Talk:
    """The state that a chat's commands act on."""

    def __init__(self, engine: "Engine", sampling: SamplingConfig, system: str | None) -> None:
        self.engine = engine
        self.sampling = sampling
        self.conversation = Conversation(system)
        self.session: Session = engine.new_session()
        self.attached: list[str] = []  # texts that go before the next message
        self.pictures: list[Picture] = []  # that are shown with the next message
        self.last: GenerationStats | None = None
        self._reader: PictureReader | None = None

    @property
    def model(self) -> str:
        return self.engine.path.name

    def say(self, text: str) -> None:
        """Ask `text`, behind what is attached, and stream the answer.

        When that fails, or is stopped before the first character, the question is taken back.
        """
        self.conversation.ask("\n\n".join([*self.attached, text]), self.pictures)
        try:
            answered = self._answer()
        except BaseException:
            self.conversation.take_back_question()
            raise
        if answered:
            self.attached.clear()
            self.pictures.clear()
        else:
            self.conversation.take_back_question()

    def regenerate(self) -> None:
        """Answer the last question anew; the old answer stays when that comes to nothing."""
        old = self.conversation.take_back_answer()
        try:
            answered = self._answer()
        except BaseException:
            self.conversation.answer(old)
            raise
        if not answered:
            self.conversation.answer(old)

    def restart(self, conversation: Conversation) -> None:
        """Go on with another conversation; nothing in the KV cache is of it."""
        self.conversation = conversation
        self.session.reset()
        self.attached.clear()
        self.pictures.clear()
        self.last = None

    def look(self, path: Path) -> "Picture":
        """A picture for this model. Raises MoecliError for none, and where the model sees none."""
        if self._reader is None:
            from moecli.vision.picture import PictureReader

            self._reader = PictureReader.of(self.engine.path)
        return self._reader.read(path)

    def _answer(self) -> bool:
        """Stream the answer to the last question; whether there is one."""
        try:
            token_ids = self.engine.encode_chat(self.conversation.messages, self.session)
            answer = stream_answer(
                lambda cancelled: self.engine.generate(
                    *(self.session, token_ids, self.sampling, cancelled),
                    self.conversation.pictures,
                ),
                self.engine.splitter(token_ids),
                StreamWriter(),
            )
        except MoecliError:  # told before anything was computed
            raise
        except BaseException:
            self.session.reset()  # the KV cache may hold half a step
            raise
        self.last = answer.finished.stats
        if answer.never_began:
            self._say_why(answer.finished.reason, len(token_ids))
            return False
        self._keep(answer.finished)
        return True

    def _say_why(self, reason: FinishReason, num_asked: int) -> None:
        """Why there is no answer to a prompt of so many tokens."""
        say(f"{_WHY[reason]} before the answer began; the question is taken back")
        if (read := len(self.session.tokens)) < num_asked:
            say(f"{read} of {num_asked} tokens were read; asked again, it goes on from there")

    def _keep(self, finished: Finished) -> None:
        self.conversation.answer(finished.text)
        if finished.reason == "context":
            say(
                f"the context of {self.engine.ctx} tokens is full: /clear starts afresh, "
                "`--ctx` makes it longer next time"
            )

    def facts(self) -> list[tuple[str, str]]:
        """How long the talk is and what it has cost, label and value."""
        counts: Any = self.engine.expert_stats()
        rate = counts.hit_rate
        return [
            ("context", f"{len(self.session.tokens)} of {self.engine.ctx} tokens"),
            ("answers", str(self.conversation.num_answers)),
            ("experts", "none asked for" if rate is None else f"{rate:.1%} hit since the start"),
        ]
