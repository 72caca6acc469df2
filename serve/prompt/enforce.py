"""The schemas that a request demands of its answer, and what of each can be enforced: worked out once a schema."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from serve.api.messages import InvalidRequest, MessagesRequest
from serve.formats.format import Format
from serve.formats.schemas import Unenforceable
from serve.limits.recent import Recent
from serve.prompt.grammar import ANSWER_FIELD, Form, demanded_tools, schema_grammars
from serve.prompt.relax import MOST_SECONDS, Budget, Relaxed, relax, unenforced

Schema = dict[str, Any]
MEMORY = 6  # bytes that a schema takes as Python objects, for each character of its JSON, about
EMPTY: dict[Form, Schema] = {Form.ANSWER: {}, Form.ARGUMENTS: {"type": "object"}, Form.PARAMETERS: {"type": "object"}}


@dataclass(frozen=True)
class DemandedSchema:
    """A schema that an answer, or the arguments of a call in it, has to obey."""

    field: str  # of the tool, or ANSWER_FIELD
    name: str  # of the tool, or of the field
    schema: Schema
    form: Form

    @cached_property
    def key(self) -> bytes:
        """Equal for equal schemas in the same form."""
        try:
            text = json.dumps(self.schema)
        except RecursionError:  # refused wherever it is used
            text = ""
        return hashlib.blake2b(f"{self.form.value} {text}".encode(), digest_size=16).digest()


# Called with the JSON pointers of what a schema is enforced without.
Report = Callable[[DemandedSchema, Sequence[str]], None]


def demanded_schemas(request: MessagesRequest, format: Format) -> list[DemandedSchema]:
    """The schemas that a request demands; none if its answer is free."""
    choice, wanted = request.tool_choice, request.answer_format
    forced = choice is not None and choice.type in ("any", "tool")
    if not forced and not wanted:
        return []
    form = Form.PARAMETERS if format.parameter else Form.ARGUMENTS
    demanded = [
        DemandedSchema(field, f"tool {tool.name}", tool.input_schema, form)
        for field, tool in demanded_tools(request, format, {})
    ]
    if wanted and not forced:
        demanded.append(DemandedSchema(ANSWER_FIELD, ANSWER_FIELD, wanted.schema, Form.ANSWER))
    return demanded


class Enforcer:
    """What can be enforced of each schema, remembered within a limit in bytes. Any thread may use it.

    `compiles` says whether a grammar compiles, of a whole schema or of a part, for which less work has to do.
    """

    def __init__(
        self,
        compiles: Callable[[str, bool], bool],
        report: Report,
        most_bytes: int,
        most_seconds: float = MOST_SECONDS,
    ) -> None:
        self.compiles, self.report, self.most_seconds = compiles, report, most_seconds
        self.found: Recent[bytes, Relaxed] = Recent(most_bytes, size_of, scoped=True)

    def known(self, demanded: Sequence[DemandedSchema]) -> dict[str, Schema]:
        """The schemas, by field, that take the place of demanded ones, as far as that was worked out before."""
        found = {each.field: self.found.get(each.key) for each in demanded}
        return {field: relaxed.schema for field, relaxed in found.items() if relaxed and relaxed.schema is not None}

    def compiled(self, demanded: Sequence[DemandedSchema]) -> None:
        """Note that a grammar of these schemas compiles; the keywords in them that it leaves out are reported once."""
        for each in demanded:
            if self.found.get(each.key) is None:
                self.keep(each, Relaxed(None, tuple(unenforced(each.schema))))

    def enforced(self, demanded: Sequence[DemandedSchema]) -> dict[str, Schema]:
        """The schemas, by field, that take the place of demanded ones, some of which do not compile.

        Takes at most about the time of a `Budget`, besides one attempt for each schema; those that are left then are
        not enforced this time. Raises InvalidRequest if these attempts alone take as long again.
        """
        budget, result = Budget(until=time.thread_time() + self.most_seconds), {}
        for each in demanded:
            if (relaxed := self.found.get(each.key)) is None:
                if time.thread_time() > budget.until + self.most_seconds:
                    raise InvalidRequest(
                        f"{each.field}: its schemas take more than {self.most_seconds:g} s to compile: demand fewer or "
                        "simpler ones, or raise --grammar-seconds",
                        "grammar_seconds",
                    )
                late = budget.spent
                relaxed = self.worked_out(each, budget)
                if not late:
                    self.keep(each, relaxed)
            if relaxed.schema is not None:
                result[each.field] = relaxed.schema
        return result

    def worked_out(self, demanded: DemandedSchema, budget: Budget) -> Relaxed:
        """What can be enforced of a schema."""
        try:
            if self.all_compile(demanded.schema, demanded.form, True):
                return Relaxed(None, tuple(unenforced(demanded.schema)))
        except InvalidRequest:  # it is too large, and refused as that
            return Relaxed(None, ())

        def compiles(schema: Schema, whole: bool) -> bool:
            try:
                return self.all_compile(schema, demanded.form, whole)
            except InvalidRequest:
                return False

        relaxed = relax(demanded.schema, compiles, EMPTY[demanded.form], budget)
        return Relaxed(relaxed.schema, (*relaxed.dropped, *unenforced(relaxed.schema)))

    def all_compile(self, schema: Schema, form: Form, whole: bool) -> bool:
        """Whether all grammars of `schema_grammars` compile; raises InvalidRequest for a schema that is too large."""
        try:
            return all(self.compiles(text, whole) for text in schema_grammars(schema, form, whole))
        except Unenforceable:
            return False

    def keep(self, demanded: DemandedSchema, relaxed: Relaxed) -> None:
        """Remember what was found, and report what is not enforced."""
        self.found.put(demanded.key, relaxed)
        if relaxed.dropped:
            self.report(demanded, relaxed.dropped)


def size_of(relaxed: Relaxed) -> int:
    """The memory of what was found, in bytes, about."""
    schema = 0 if relaxed.schema is None else MEMORY * len(json.dumps(relaxed.schema))
    return schema + sum(map(len, relaxed.dropped))
