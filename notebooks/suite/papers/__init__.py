"""Reproductions, a file a paper; notebooks take their names, or whole papers, from here."""

from suite.lazy import lazily

__getattr__ = lazily(__name__, {
    "dynamic_ofa": ["published_tables"],
    "evolution": ["evolve", "published_evolution"],
    "hadas": [
        "HADAS_SPACE", "exhaustive", "published_exits", "share_half_way", "split_gain",
        "without_dissimilarity",
    ],
    "incremental_training": ["grow"],
    "jetson_tables": ["levels_ms"],
    "laudnet": ["judge"],
    "ztt": ["matches", "train_agent"],
})  # fmt: skip
