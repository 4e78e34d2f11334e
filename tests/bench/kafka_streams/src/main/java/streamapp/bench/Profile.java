package streamapp.bench;

import java.util.HashMap;
import java.util.Map;

/** What is known of one user. */
public final class Profile {

    /** A label's weight and the instant that this is of, Unix seconds. */
    public static final class Interest {
        double weight;
        double since;

        Interest(double weight, double since) {
            this.weight = weight;
            this.since = since;
        }
    }

    /** Whether the user is in a segment, and how many transitions there were. */
    public static final class Membership {
        boolean inside;
        int seq;

        Membership(boolean inside, int seq) {
            this.inside = inside;
            this.seq = seq;
        }
    }

    final Map<String, Interest> interests;
    final Map<String, Membership> memberships;

    Profile() {
        this(new HashMap<>(), new HashMap<>());
    }

    Profile(Map<String, Interest> interests, Map<String, Membership> memberships) {
        this.interests = interests;
        this.memberships = memberships;
    }
}
