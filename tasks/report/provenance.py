"""The parts of the page about what the training was made of: data, time and energy, how to reproduce it."""

from __future__ import annotations

from tasks.gpu_offers import PRICES_AS_OF
from tasks.report.costs import device
from tasks.report.facts import Facts, train_command
from tasks.report.html import Html, Part, compact, duration, el, facts_list, folded, size


def data(facts: Facts) -> Html:
    """What it was trained on."""
    config = facts.config
    dataset, fields = config.dataset, config.data
    per_epoch = dataset.train_samples * dataset.tokens_per_sample
    odd = (facts.history.last("checkpoint") or {}).get("odd_rows") or {}
    total = sum(file.get("size") or 0 for file in facts.data_files)
    unit = "articles" if fields.split_by == "article" else "samples"
    rows: list[tuple[str, Part]] = [
        ("path", el("code", fields.path)),
        ("revision", dataset.revision),
        ("digest", el("code", dataset.digest)),
        ("files", f"{dataset.files:,}" + (f", {size(total)}" if total else "")),
        ("rows", f"where {fields.filter}" if fields.filter else "all of them"),
        ("samples", f"{dataset.samples:,}, of which {dataset.train_samples:,} are trained on"),
        ("split", f"{100 * fields.train_ratio:g} % of the {unit}, by a keyed hash (seed {config.seed})"),
        ("trained on", f"{facts.tokens:,} tokens, about {facts.tokens / per_epoch:.2f} epochs (estimated)" if per_epoch else None),
        ("windows", f"{fields.max_length:,} tokens; {config.global_batch:,} windows a step"),
        ("odd rows so far", ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in odd.items() if count) or None),
        ("text", el("pre", fields.text_template)),
    ]
    return el("section", el("h2", "Data", id="data"), facts_list(rows))


def costs(facts: Facts) -> Html:
    """Hours, energy, money."""
    told, cost = facts.history, facts.costs
    resumed = len([mark for mark in told.marks if mark.kind == "resumed"])
    lost = f"; {told.steps_lost:,} of {told.steps_lost + len(told.steps['loss'].values):,} steps computed twice" if told.steps_lost else ""
    price = f"assumed: {cost.offer.name} at ${cost.offer.usd_per_hour:.2f} an hour ({PRICES_AS_OF})" if cost.offer else "assumed prices"
    rows: list[tuple[str, Part]] = [
        ("device", f"{device(facts.history)}, {told.started['precision']}"),
        ("time", f"{duration(told.seconds)} in {resumed + 1} run{'s' * (resumed > 0)}, pauses left out{lost}"),
        ("operations", f"{facts.flops:.2e} FLOPs, by 6·N + 12·L·H·Q·T a token"),
        ("energy", _energy(facts)),
        ("cost", [f"${cost.usd:,.2f} ", el("small", price)] if cost.usd is not None else None),
    ]
    return el("section", el("h2", "Time and energy", id="costs"), facts_list(rows))


def _energy(facts: Facts) -> Part:
    cost = facts.costs
    parts: list[Part] = []
    if cost.measured_joules is not None:
        whole = "" if cost.estimated_joules == 0 else f" in {duration(cost.measured_seconds)} of the time"
        parts.append(el("span", f"{_kwh(cost.measured_joules)} measured{whole}"))
        parts.append(el("small", f"counters: {', '.join(cost.counters)}; each counts its whole processor or board"))
    if cost.estimated_joules:
        parts.append(el("span", f"{'and ' * bool(parts)}{_kwh(cost.estimated_joules)} estimated"))
        parts.append(el("small", f"{'no counter could be read' if len(parts) == 1 else 'for the rest'}: {cost.assumption}"))
    if cost.estimated_joules is None:
        parts.append(el("span", f"not known: {cost.assumption}"))
    return parts


def _kwh(joules: float) -> str:
    return f"{compact(joules / 3.6e6)} kWh" if joules >= 36_000 else f"{compact(joules / 3600)} Wh"


def reproduction(facts: Facts) -> Html:
    """The commands, and what they start from."""
    codes = list(dict.fromkeys((s.started["code"]["commit"], s.started["code"]["diff_sha256"]) for s in facts.history.segments))
    commit, difference = codes[-1]
    lines = [
        f"git checkout {commit}" if commit else "# the code was in no git checkout: its commit is not known",
        f"# with changes that were not committed: git diff HEAD -- model tasks flows had SHA-256 {difference}" if difference else "",
        train_command(facts.name, facts.overrides, "post-train" if facts.config.post_training else "train"),
        f"gpt2 replay {facts.tracking_run}  # the first steps again: are the losses the same to the bit?" if facts.tracking_run else "",
    ]
    digests = [row for row in facts.checkpoints if row["digest"]][-1:]
    versions = facts.history.started["versions"]
    rows: list[tuple[str, Part]] = [
        ("seed", str(facts.config.seed)),
        ("config digest", el("code", facts.config.digest)),
        ("dataset digest", el("code", facts.config.dataset.digest)),
        ("evaluation set", el("code", facts.evaluation_set) if facts.evaluation_set else None),
        ("newest checkpoint", [f"{row['name']} ", el("code", row["digest"])] if (row := next(iter(digests), None)) else None),
        ("champion", el("code", facts.champion["digest"]) if facts.champion else None),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("commits", el("small", "; ".join(str(c) for c, _ in codes)) if len(codes) > 1 else None),
    ]
    return el(
        "section",
        el("h2", "How to reproduce it", id="reproduce"),
        el("pre", "\n".join(line for line in lines if line)),
        facts_list(rows),
        folded("The whole configuration (config.yaml)", el("pre", facts.config_text)),
    )
