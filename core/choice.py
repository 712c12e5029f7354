"""Which of several bids serves: ranked by priority, narrowed by what the user asked for, never settled by accident."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from core.contracts import Bid, Refusal
from core.errors import NoImplementation, PluginError
from core.plugin_report import render

T = TypeVar("T")
AUTO, NATIVE = "auto", "native"
# What pip calls core-serve's own model plugins, by what --model-impl calls them; whoever asks for any gets the widest.
INSTALL = {
    AUTO: "core-serve-hf-fallback",
    "transformers": "core-serve-hf-fallback",
    "native_llama": "core-serve-native-llama",
}


@dataclass(frozen=True)
class RankedBid(Generic[T]):
    plugin: str
    bid: Bid[T]


@dataclass(frozen=True)
class Choice(Generic[T]):
    """Who bid, who declined, and whom to try, in order."""

    ranked: tuple[RankedBid[T], ...]  # every bid, the best first
    refusals: tuple[tuple[str, str], ...]  # (plugin, reason)
    eligible: tuple[Bid[T], ...]  # those that the user's wish leaves, the best first; not empty
    kind: str = "model implementation"
    wish: str = "--model-impl auto"  # what narrowed `ranked` to `eligible`

    @property
    def winner(self) -> RankedBid[T]:
        """The bid that is tried first."""
        return next(one for one in self.ranked if one.bid is self.eligible[0])


@dataclass(frozen=True)
class Wish:
    """What the user asked for: `auto`, `native` (where has_native) or a name."""

    kind: str
    flag: str
    name: str = AUTO
    prefer: Sequence[str] = ()
    has_native: bool = False

    @property
    def text(self) -> str:
        return f"{self.flag} {self.name}"


def choose(answers: Sequence[tuple[str, Bid[T] | Refusal]], wish: Wish) -> Choice[T]:
    """Rank the answers (plugin, bid or refusal). Raises NoImplementation if nothing fits, PluginError on a tie."""
    bids = [RankedBid(plugin, answer) for plugin, answer in answers if isinstance(answer, Bid)]
    refusals = tuple((plugin, answer.reason) for plugin, answer in answers if isinstance(answer, Refusal))
    _check_names(bids, wish)
    ranked = sorted(bids, key=lambda one: (-one.bid.priority, not _preferred(one, wish.prefer)))  # stable: by plugin
    eligible = _eligible(ranked, wish)
    if not eligible:
        raise NoImplementation(_nothing_fits(ranked, refusals, wish))
    _check_tie(eligible, wish)
    return Choice(tuple(ranked), refusals, tuple(one.bid for one in eligible), wish.kind, wish.text)


def _check_names(bids: Sequence[RankedBid[Any]], wish: Wish) -> None:
    owners: dict[str, str] = {}
    for one in bids:
        if one.bid.name in owners:
            raise PluginError(
                f"Plugins {owners[one.bid.name]!r} and {one.plugin!r} both bid as {wish.kind} {one.bid.name!r}; "
                f"names must differ. Leave one out: --disable-plugin {one.plugin}"
            )
        owners[one.bid.name] = one.plugin


def _preferred(one: RankedBid[Any], prefer: Sequence[str]) -> bool:
    return one.bid.name in prefer or one.plugin in prefer


def _eligible(ranked: list[RankedBid[T]], wish: Wish) -> list[RankedBid[T]]:
    if wish.name == AUTO:
        return ranked
    if wish.name == NATIVE and wish.has_native:
        return [one for one in ranked if not one.bid.is_fallback]
    by_name = [one for one in ranked if one.bid.name == wish.name]
    by_family = [one for one in ranked if one.bid.family == wish.name]
    return by_name or by_family or [one for one in ranked if one.plugin == wish.name]


def _check_tie(eligible: Sequence[RankedBid[Any]], wish: Wish) -> None:
    """Two bids of one plugin stand in its own order; between plugins only the user decides."""
    best = [one for one in eligible if one.bid.priority == eligible[0].bid.priority]
    rivals = [one for one in best if _preferred(one, wish.prefer)] or best
    plugins = {one.plugin for one in rivals}
    if len(plugins) > 1:
        names = " and ".join(f"{one.bid.name!r} of plugin {one.plugin!r}" for one in rivals)
        raise PluginError(
            f"{names} bid for this model as {wish.kind} with the same priority {best[0].bid.priority}. "
            f"Settle it with --prefer NAME (a plugin's or an implementation's), for example --prefer {rivals[0].plugin}"
        )


def _nothing_fits(ranked: Sequence[RankedBid[Any]], refusals: Sequence[tuple[str, str]], wish: Wish) -> str:
    there = ", ".join(f"{one.bid.name} (plugin {one.plugin}, {one.bid.priority})" for one in ranked) or "none"
    declined = "; ".join(f"{plugin}: {reason.rstrip('.')}" for plugin, reason in refusals) or "none"
    if wish.name == AUTO:
        what = f"No plugin offers a {wish.kind} for this model."
    elif wish.name == NATIVE and wish.has_native:
        what = f"{wish.text}: no native {wish.kind} for this model."
    else:
        what = f"{wish.text}: no {wish.kind} of this name for this model."
    return f"{what} Bids: {there}. Declined: {declined}. {_way_on(ranked, wish)}"


def _way_on(ranked: Sequence[RankedBid[Any]], wish: Wish) -> str:
    if wish.has_native and (wish.name in INSTALL or not ranked):  # a model implementation
        package = INSTALL.get(wish.name, INSTALL[AUTO])
        return f"Install a plugin that knows this model; it may be core-serve's own: pip install {package}"
    return f"Choose one that bids with {wish.flag}." if ranked else "Install a plugin that has one."


# ------------------------------------------------------------------------------------------------ explain


def explain_text(choice: Choice[Any], width: int = 120) -> str:
    """Return the ranked table: who serves and why, who else bid, and why each of the others declined."""
    from rich.table import Table

    table = Table(choice.kind, "plugin", "priority", "features", "verdict")
    for one in choice.ranked:
        table.add_row(one.bid.name, one.plugin, str(one.bid.priority), _features(one.bid), verdict(choice, one))
    for plugin, reason in choice.refusals:
        table.add_row("-", plugin, "-", "", f"declined: {reason}")
    return render(table, width)


def explain_json(choice: Choice[Any]) -> dict[str, Any]:
    bids = [
        {
            "name": one.bid.name,
            "plugin": one.plugin,
            "priority": one.bid.priority,
            "features": {name: _plain(value) for name, value in one.bid.features.items()},
            "is_fallback": one.bid.is_fallback,
            "verdict": verdict(choice, one),
        }
        for one in choice.ranked
    ]
    declined = [{"plugin": plugin, "reason": reason} for plugin, reason in choice.refusals]
    return {"chosen": choice.winner.bid.name, "wish": choice.wish, "bids": bids, "declined": declined}


def verdict(choice: Choice[Any], one: RankedBid[Any]) -> str:
    """Return in a few words what becomes of a bid."""
    places = [index for index, bid in enumerate(choice.eligible) if bid is one.bid]
    if not places:
        return f"left out by {choice.wish}"
    if places[0] > 0:
        return f"stands by as number {places[0] + 1}"
    rest = [bid.priority for bid in choice.eligible[1:]]
    why = "the only one" if not rest else "preferred" if rest[0] == one.bid.priority else "highest priority"
    return f"serves: {why}" if choice.wish.endswith(f" {AUTO}") else f"serves: {why} for {choice.wish}"


def _features(bid: Bid[Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in _as_text(bid.features).items())


def _as_text(features: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(_plain(value)) for name, value in features.items()}


def _plain(value: Any) -> Any:
    """Return a value as JSON knows it; sets in a fixed order."""
    if isinstance(value, (set, frozenset)):
        return sorted(str(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
