"""Real-time growth segments.

The path of an event, by the files that it passes:

1. `adapters/transport.py` takes records from Kafka through Faust, in slices of one partition.
2. `adapters/assignment.py` hands each slice to the task of its partition, `adapters/partition.py`, which
   takes it through all that follows.
3. `adapters/codec.py` turns bytes into an event, or into a reason for the dead-letter topic.
4. `adapters/profile_store.py` loads the profiles of the slice's users: those who came last from
   `adapters/profile_cache.py`, the others from Redis, all at once.
5. `core/step.py` and `core/fold.py` decide: a profile and an event go in, the new profile and the
   transitions come out. `core/patch.py` does the same for common events to profiles as they are packed.
   `core/decay.py` is the arithmetic, `core/segment.py` the definitions, `core/segment_set.py` what they are
   compiled to.
6. With the model on, `core/model.py` scores every event and then learns from it, and scores its user as he is
   now; `core/discovery.py` decides who is in a discovery segment. `adapters/learning.py` says from which
   record on a worker learns, and brings together what several have learned.
7. `adapters/commit.lua` makes profiles, scores, indexes, outbox and watermark durable in one call.
8. `adapters/publisher.py` sends the outbox to the output topics; then the slice is acknowledged.

An exit that no event brings takes the same way from step 4 on, when its instant has come. `app.py` puts the
parts together; `cli.py` and `commands/` are the verbs; `lookup/` reads what is stored; `evaluation/` says how
good the model is.
"""
