"""Our experiments, a file each; notebooks take their names from here."""

from suite.lazy import lazily

__getattr__ = lazily(__name__, {
    "adaptation": ["replay_trace"],
    "adapt": [
        "Exit", "Exits", "Pair", "Routes", "answers", "cascade_of", "cheapest",
        "difficulty_ranks", "even_sample", "exit_choices", "exits_of", "exits_said",
        "gate_macs_m", "gated_of", "halves", "knob_case", "most_accurate", "paired_drop",
        "per_image", "portraits", "predicted_share", "right", "routes_of", "speedup", "time_rounds",
    ],
    "adapt_joint": [
        "choose", "joint_path", "joint_rows_path", "load_joint_exits", "train_exits_jointly",
        "train_gate_jointly", "ways_of",
    ],
    "adapt_parts": ["MODES", "part_table", "part_times", "saved_pct"],
    "adapt_peer": ["ABSENT", "earlyon_installed", "earlyon_of"],
    "adapt_train": [
        "exits_path", "features_of", "first_path", "load_exits", "ship_exits", "train_first",
    ],
    "adapt_vit": ["slices_against_masks"],
    "adapt_vit_routes": [
        "LOST_PP", "confidence_rows", "exit_of", "gate_rows", "static_rows", "vit_routes",
    ],
    "adapt_vit_train": ["load_vit", "ship_vit", "train_vit", "vit_path"],
    "ablation": ["compare_alone", "compare_recipes", "single"],
    "across": ["can_link", "ddp_losses", "drop_link", "kill_some", "learn", "learn_text",
               "time_grid"],
    "at_scale": ["draw_rates", "predict_steps"],
    "bound": ["attackers", "below_optimum"],
    "bundles": ["bundle_latency", "bundle_memory"],
    "code_size": ["manager_tokens"],
    "compare": ["compare_policies", "headline", "published_ladder", "reductions"],
    "contention": ["judged_cases"],
    "dials": ["Dials"],
    "fuzz": ["try_readers"],
    "housekeeping": ["committed_runs", "line_coverage", "no_coverage", "redraw_committed"],
    "in_lab": ["no_browser", "try_in_lab"],
    "judge_boards": ["clock_models", "find_data", "published_grid", "queues", "resolutions"],
    "judge_machine": ["inject_faults", "machine_costs_us", "quota_tracking", "reached"],
    "life": ["LIFE", "life_case", "life_workload"],
    "live": [
        "Labelled", "bursts", "compare_live", "duty_sweep", "fixed_policies", "harm_points",
        "predict", "serve_all",
    ],
    "live_soak": ["soak_live", "trouble_free_minutes"],
    "load": ["Burst", "background"],
    "manage": [
        "against_optimum", "contenders", "decision_us", "everybody", "levels", "optimum_rows",
        "over_linux", "published_and_own", "recoveries", "rivals", "sensitivity", "simulate_each",
        "simulate_many", "simulation_speed", "tables_by_work", "taught",
    ],
    "mechanisms": ["MECHANISMS", "most_of_each", "take_out", "what_each_brings"],
    "own_model": [
        "KINDS", "accuracies", "best_within", "find_photos", "lite0", "try_kinds", "user_lines",
    ],
    "own_board": [
        "Capped", "free_of_charge", "judge_clocks", "judge_power", "kept_to", "kill_throttled",
        "models_drawn", "wrong_files",
    ],
    "own_cost": ["own_memory_mb", "quietest"],
    "panel": ["Panel"],
    "parallel": ["in_parallel"],
    "random_workloads": ["noise_wrong", "random_case"],
    "reliability": ["kill_holders", "kill_searches", "rss_growth_mb", "soak"],
    "replay_power": ["calibrations", "replay"],
    "scenarios": ["scenario"],
    "schedule": [
        "VARIANTS", "compare_schedulers", "front_rows", "late_against_optimum", "queue_error",
        "seed_ratio", "speed", "who_runs",
    ],
    "schedule_energy": ["energy_rows"],
    "schedule_live": ["live_rows"],
    "search": [
        "compare_archives", "compare_samplers", "compare_stopping", "gains", "record_front",
        "replayed",
    ],
    "serve_many": [
        "Stage", "accuracy_pct", "ask_many", "board_by_core", "kill_many", "measured_rows", "play",
        "small_images", "train_prefixes",
    ],
    "served_program": ["PrefixNet"],
    "shared_study": ["kill_searchers", "no_postgres", "postgres"],
    "static": ["ONE", "load_resnet20"],
    "throughput": ["images_per_s", "reference_step", "sandwich_step"],
    "whole_space": ["measure_space"],
    "workers": ["trials_per_s"],
})  # fmt: skip
