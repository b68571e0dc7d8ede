"""`stoker why`: the decisions on a model or instance as tables, each way to serve it by part, and what then happened."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from stoker_cli.answers import Decision, Decisions
from stoker_cli.client import Gateway
from stoker_contracts.decisions import OptionRecord, Outcome
from stoker_core.errors import ApiFailed

_NOT_FOUND = frozenset({"model_not_found", "instance_not_found"})


async def decisions(gateway: Gateway, name: str, limit: int) -> object:
    """The admin API's answer on a model of this name, else on an instance with this id. Raises ApiFailed, NotRunning."""
    asked = quote(name, safe="")
    for path in (f"/admin/v1/models/{asked}/decisions?limit={limit}", f"/admin/v1/instances/{asked}/decisions"):
        try:
            return await gateway.json("GET", path)
        except ApiFailed as error:
            if error.remote_code not in _NOT_FOUND:
                raise
    raise ApiFailed(f"there is no model {name!r}, and no decision that started an instance {name!r}", status=404)


def rendered(found: Decisions) -> RenderableType:
    """Newest first; one that nothing is known of says so."""
    if not found.decisions:
        return Text("nothing was decided yet: no request has asked for it")
    return Group(*(part for decision in found.decisions for part in _parts(decision)))


def _parts(decision: Decision) -> Iterator[RenderableType]:
    made = decision.made_at.strftime("%Y-%m-%d %H:%M:%S") if decision.made_at else ""
    started = f"started {decision.instance_id}" if decision.instance_id else "started nothing"
    yield Text.from_markup(
        f"[bold]{escape(decision.model)}[/] [dim]{made}, term {decision.term}[/] {started}: {escape(decision.reason)}"
    )
    if decision.options or decision.outcome:
        yield _table(decision)
    more = decision.weighed - len(decision.options)
    if more > 0:
        yield Text(f"  and {more} more, none of them better")
    yield Text.from_markup(f"  {_verdict(decision)}")
    yield Text()


def _table(decision: Decision) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("", "NODE", "DEVICES", "FROM", "HOW", "QUEUE", "ROOM", "LOAD", "ENGINE", "TOTAL", "STAGES"):
        right = header in ("QUEUE", "ROOM", "LOAD", "ENGINE", "TOTAL")
        table.add_column(header, justify="right" if right else "left", no_wrap=right)
    for index, option in enumerate(decision.options):
        chosen = index == decision.chosen
        table.add_row("→" if chosen else " ", *_option(option), style="bold" if chosen else "")
    if decision.outcome is not None:
        taken = decision.option
        place = (escape(taken.node), ",".join(map(str, taken.devices))) if taken else ("", "")
        table.add_row("=", *place, *_outcome(decision.outcome), style="cyan")
    return table


def _option(option: OptionRecord) -> tuple[str, ...]:
    startup = option.startup
    return (
        escape(option.node),
        ",".join(map(str, option.devices)),
        _source(option.source, option.origin),
        option.how,
        _seconds(startup.queue_s),
        _seconds(startup.room_s),
        _seconds(startup.load_s),
        _seconds(startup.engine_s),
        f"{_seconds(startup.total_s)} ±{100 * startup.spread:.0f}%",
        ", ".join(f"{escape(stage.name)} {_seconds(stage.seconds)}" for stage in startup.stages),
    )


def _outcome(outcome: Outcome) -> tuple[str, ...]:
    """Under the same headers. What lay before the order stands under ROOM: the room was made then."""
    before = "" if outcome.queue_s is None else _seconds(outcome.queue_s)
    total = _seconds(outcome.total_s)
    return (
        _source(outcome.source, outcome.origin),
        "failed" if outcome.failure else "happened",
        "",
        before,
        _seconds(outcome.load_s),
        _seconds(outcome.engine_s),
        total,
        "",
    )


def _verdict(decision: Decision) -> str:
    outcome = decision.outcome
    if outcome is None:
        return "[dim]how it went is not known yet[/]" if decision.instance_id else "[dim]nothing to measure[/]"
    if outcome.failure:
        return f"[red]failed: {escape(outcome.failure)}[/]"
    if decision.error is None:
        return "[dim]nothing was predicted of it[/]"
    load = "" if decision.load_error is None else f", the load by {100 * decision.load_error:.0f}%"
    return f"predicted {_seconds(_predicted_s(decision))}, took {_seconds(outcome.total_s)}: off by {100 * decision.error:.0f}%{load}"


def _predicted_s(decision: Decision) -> float:
    return decision.option.startup.total_s if decision.option else 0.0


def _source(tier: str, origin: str) -> str:
    return escape(f"{tier} ({origin})" if origin else str(tier))


def _seconds(value: float) -> str:
    """0.12 s, 12.3 s, 123 s."""
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


def show(found: Decisions) -> None:
    """Print them; where there is no terminal as wide as they need, so that lines stay whole."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=240)
    console.print(rendered(found))
