"""The part that runs inside the engine's process: numpy and the standard library only; it never raises and never waits.

How K of a step is chosen:

1. `tap.EngineTap.begin_step` reads the newest policy from the policy page. Without a fresh one, K is the launch K.
2. `planner.Planner.draft_length` takes K from the trial that is due (a measurement of the controller), else from the policy's
   table by batch size and context length.
3. The planner replaces a K that the engine does not run at this batch size by the largest allowed one that is not larger, else
   by the smallest one. Such a step is flagged LIMITED. A policy made for this engine never asks for one.
4. Where all requests of a step share one K (SGLang's EAGLE), `step_choice.refined_k` may replace the table's K by one that fits
   the requests of this step better.
5. Where verify lengths may differ (ragged verification), `planner.Planner.verify_lengths` chooses how many of the K draft
   tokens of each request are verified.
"""
