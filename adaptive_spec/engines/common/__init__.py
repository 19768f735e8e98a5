"""What the attachments of several engines share. It imports no engine; torch inside some modules.

    hook_guard            wraps every hook: counts failures, keeps them from the engine, detaches after too many
    steps_in_flight       matches each decode step with its own result and times, and writes the finished step
    stage_clock           stage times: the host's clock on a CPU, CUDA events on a GPU
    max_probability       the draft's confidence: the largest softmax probability of its logits
    host_probabilities    the same for the logits of several forwards, on the CPU
    plugin_settings       the environment variables that configure a plugin
    ring_follower         figures of a running server from its record ring, for the demonstration and benchmarks
    pinned_ring           copies of confidences from a GPU to the host that nothing waits for

Beside this package: `engines/static_contract` (what a plugin needs of an engine, checked in its source), `engines/releases`
(which releases a plugin hooks into). docs/how-to/write-an-engine-adapter.md says how an engine is added.
"""
