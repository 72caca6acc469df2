"""What is asked of the engine's thread between two steps."""

from __future__ import annotations

from collections.abc import Callable

from serve.engine.inbox import Inbox


def failing() -> None:
    raise RuntimeError("a fault in a question")


def test_a_question_that_raises_costs_no_other_its_answer() -> None:
    inbox, answers = Inbox(), list[int]()
    inbox.ask(failing)
    inbox.ask(lambda: answers.append(1))
    inbox.answer()
    assert answers == [1]


def test_requests_have_their_turn_however_many_questions_are_asked() -> None:
    inbox, answers = Inbox(), list[int]()

    def again(number: int) -> Callable[[], None]:
        def question() -> None:
            answers.append(number)
            inbox.ask(again(number + 1))

        return question

    inbox.ask(again(0))
    inbox.answer(0.0)
    assert answers == [0], "one, though there are more by then"
    inbox.answer(0.01)
    assert answers == list(range(len(answers)))
    inbox.sleep(60)  # not while a question waits
