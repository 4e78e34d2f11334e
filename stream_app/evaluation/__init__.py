"""The model judged on event files: predict each event, then learn from it, strictly in time order.

In the order in which an event meets them: `files` (lines in, events out), `worker` (what the service does
with a slice of them, in memory), `baselines` (what is known of a stream at an instant, and the simple
rankings that follow from it), `figures` (ranks in, MRR and the like out), `lift` (what growth weights are
worth to a campaign), `prequential` (all of it over one stream), `offline` (recommenders of the tests, if they
are here).

The protocol, which model and baselines share:

- Every event with labels is one example, judged before anything learns from it. Only the first labelled event
  of a stream is none: there was nothing to rank.
- Next: the candidates are all labels that the stream has shown before.
- Discovery: an example for each event that brings a user who has a history a label that this user has never
  engaged in the stream; the candidates are the labels that the user has not engaged. A user whose profile the
  service has forgotten, so that it begins anew with the event, has no history; such events are counted.
- The labels of an event are a set and the best-ranked counts. Equal scores share the middle rank.
- A label that the stream has not shown before is no candidate; an event that has only such labels is a miss.
- A baseline knows all earlier events. The model knows what the worker would: it scores a batch before it
  learns from it, and of a user's past what is in the profile.
"""
