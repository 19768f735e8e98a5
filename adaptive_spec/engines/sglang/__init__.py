"""The SGLang plugin: chooses K, or the verify lengths of DSpark, inside SGLang's scheduler processes. See docs/sglang.md.

Loaded by SGLang's processes. They import numpy and the standard library only, torch and SGLang inside functions, and
`common.plugin_settings` imports `config` (pydantic, PyYAML) when ADAPTIVE_SPEC_CONFIG is set:

    plugin                the entry point `register`: decides whether to hook into this SGLang, and registers the hooks
    contract              all that is hooked or used of SGLang, in groups that may fail separately, and the supported releases
    attachment            what all algorithms share: start-up, the tap, the ranks, results, the engine report
    eagle_attachment      the hooks of an EAGLE server, which decide K of each step
    dspark_attachment     the hooks of a DSPARK server, which decide how many draft tokens are verified
    watched_attachment    the hooks of servers that are only observed: NGRAM, multi-layer EAGLE, no speculation
    eagle_draft_policy    gives K to SGLang's AdaptiveController by its protocol `AdaptiveSpecPolicy`
    dspark_swap           turns a policy into DSpark's SPS cost table and temperatures, and swaps them in the running planner
    supported_servers     which server arguments the plugin can decide for, observe only, or must refuse
    confidences           draft confidences from the draft model's logits, copied to the host without waiting
    switch_upkeep         bounds the log lines and list entries that SGLang adds at every K switch
    ranks                 all tensor-parallel ranks act on the same policy in every step
    rank_notes            what ranks tell rank 0: a thread on the store of torch.distributed

Not loaded by SGLang's processes:

    doctor_checks         what `adaptive-spec doctor` reports of an installed SGLang
    cpu_kit               starts a real SGLang server on a CPU (examples/sglang-cpu)
    demo_worker           the engine process of `adaptive-spec demo --engine sglang`
"""
