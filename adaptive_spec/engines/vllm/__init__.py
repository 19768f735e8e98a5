"""The vLLM plugin: chooses K, and a verify length for every request, inside vLLM's EngineCore. See docs/vllm.md.

Loaded by vLLM's processes. They import numpy and the standard library only, torch and vLLM inside functions, and
`common.plugin_settings` imports `config` (pydantic, PyYAML) when ADAPTIVE_SPEC_CONFIG is set:

    plugin                  the entry point `register`: decides whether to hook into this vLLM, and registers the hooks
    contract                all that is hooked or used of vLLM, in groups that may fail separately, and the supported releases
    supported_servers       which configurations the plugin can decide for, observe only, or must refuse
    launch_schedule         the schedule of K that vLLM must be launched with
    scheduler_attachment    the hooks of the scheduler, in EngineCore: K, verify lengths, records, the engine report
    worker_attachment       the hooks of a worker: stage times and confidences
    step_notes              what workers tell EngineCore
    draft_logits            draft confidences from the draft model's logits
    cost_curves             step times for vLLM's own adaptive verification

Not loaded by vLLM's processes:

    doctor_checks           what `adaptive-spec doctor` reports of an installed vLLM
    cpu_kit                 starts a real vLLM server on a CPU (examples/vllm-cpu)
    demo_worker             the engine process of `adaptive-spec demo --engine vllm`
"""
