package streamapp.bench;

import java.util.List;
import java.util.Map;
import org.apache.kafka.streams.processor.api.ContextualProcessor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.state.KeyValueStore;

/**
 * Folds one event into its user's profile and forwards the transitions that follow: first out of segments whose
 * weight has decayed, then into those that the event's labels reach.
 */
public final class SegmentProcessor extends ContextualProcessor<String, Event, String, Transition> {

    static final String STORE = "profiles";

    private final Definitions definitions;
    private final Progress progress;
    private KeyValueStore<String, Profile> store;

    public SegmentProcessor(Definitions definitions, Progress progress) {
        this.definitions = definitions;
        this.progress = progress;
    }

    @Override
    public void init(ProcessorContext<String, Transition> context) {
        super.init(context);
        store = context.getStateStore(STORE);
    }

    @Override
    public void process(Record<String, Event> record) {
        Event event = record.value();
        Profile profile = store.get(record.key());
        if (profile == null) {
            profile = new Profile();
        }
        leave(profile, record);
        double added = definitions.actionWeight(event.eventType());
        for (String label : event.labels()) {
            Profile.Interest interest = profile.interests.get(label);
            if (interest == null) {
                profile.interests.put(label, new Profile.Interest(added, event.timestamp()));
            } else {
                interest.weight = added + weight(interest, event.timestamp());
                interest.since = event.timestamp();
            }
        }
        enter(profile, record);
        store.put(record.key(), profile);
        progress.one();
    }

    private void leave(Profile profile, Record<String, Event> record) {
        for (Map.Entry<String, Profile.Membership> entry : profile.memberships.entrySet()) {
            Profile.Membership membership = entry.getValue();
            if (!membership.inside) {
                continue;
            }
            Definitions.Segment segment = definitions.segment(entry.getKey());
            double weight = weight(profile, segment.labels(), record.value().timestamp());
            if (weight < segment.exitWeight()) {
                membership.inside = false;
                membership.seq++;
                say(record, segment, Transition.EXITED, membership.seq, weight);
            }
        }
    }

    private void enter(Profile profile, Record<String, Event> record) {
        for (String label : record.value().labels()) {
            for (Definitions.Segment segment : definitions.naming(label)) {
                Profile.Membership membership = profile.memberships.get(segment.id());
                if (membership != null && membership.inside) {
                    continue;
                }
                double weight = weight(profile, segment.labels(), record.value().timestamp());
                if (weight < segment.minWeight()) {
                    continue;
                }
                if (membership == null) {
                    membership = new Profile.Membership(false, 0);
                    profile.memberships.put(segment.id(), membership);
                }
                membership.inside = true;
                membership.seq++;
                say(record, segment, Transition.ENTERED, membership.seq, weight);
            }
        }
    }

    private double weight(Profile profile, List<String> labels, double now) {
        double most = 0.0;
        for (String label : labels) {
            Profile.Interest interest = profile.interests.get(label);
            if (interest != null) {
                most = Math.max(most, weight(interest, now));
            }
        }
        return most;
    }

    private double weight(Profile.Interest interest, double now) {
        return interest.weight * definitions.decay(now - interest.since);
    }

    private void say(
            Record<String, Event> record, Definitions.Segment segment, String status, int seq, double weight) {
        Event event = record.value();
        long time = Math.round(event.timestamp() * 1000.0);
        context().forward(
                record.withValue(new Transition(event.userId(), segment.id(), status, seq, time, weight)));
    }
}
