package streamapp.bench;

import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;
import java.util.HashMap;
import java.util.Map;
import org.apache.kafka.common.serialization.Deserializer;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serializer;

/**
 * Profiles in bytes: the number of labels, each with its name, weight and instant; then the number of segments,
 * each with its name and one int, the transitions times two, plus one for somebody who is inside. Half the size of
 * JSON and a fraction of its work. One instance serves the stores of all threads.
 */
public final class ProfileSerde implements Serde<Profile>, Serializer<Profile>, Deserializer<Profile> {

    private final ThreadLocal<ByteBuffer> buffers = ThreadLocal.withInitial(() -> ByteBuffer.allocate(4096));

    @Override
    public Serializer<Profile> serializer() {
        return this;
    }

    @Override
    public Deserializer<Profile> deserializer() {
        return this;
    }

    @Override
    public byte[] serialize(String topic, Profile profile) {
        if (profile == null) {
            return null;
        }
        ByteBuffer buffer = buffers.get().clear();
        buffer.putShort((short) profile.interests.size());
        for (Map.Entry<String, Profile.Interest> entry : profile.interests.entrySet()) {
            buffer = withName(buffer, entry.getKey());
            buffer.putDouble(entry.getValue().weight);
            buffer.putDouble(entry.getValue().since);
        }
        buffer = withRoom(buffer, Short.BYTES);
        buffer.putShort((short) profile.memberships.size());
        for (Map.Entry<String, Profile.Membership> entry : profile.memberships.entrySet()) {
            buffer = withName(buffer, entry.getKey());
            buffer.putInt(entry.getValue().seq << 1 | (entry.getValue().inside ? 1 : 0));
        }
        buffers.set(buffer);
        return Arrays.copyOf(buffer.array(), buffer.position());
    }

    @Override
    public Profile deserialize(String topic, byte[] data) {
        if (data == null) {
            return null;
        }
        ByteBuffer from = ByteBuffer.wrap(data);
        int labels = from.getShort();
        Map<String, Profile.Interest> interests = new HashMap<>(2 * labels + 2);
        for (int i = 0; i < labels; i++) {
            interests.put(getName(from), new Profile.Interest(from.getDouble(), from.getDouble()));
        }
        int segments = from.getShort();
        Map<String, Profile.Membership> memberships = new HashMap<>(2 * segments + 2);
        for (int i = 0; i < segments; i++) {
            String id = getName(from);
            int packed = from.getInt();
            memberships.put(id, new Profile.Membership((packed & 1) == 1, packed >>> 1));
        }
        return new Profile(interests, memberships);
    }

    @Override
    public void configure(Map<String, ?> configs, boolean isKey) {
        // Nothing to configure; both parents have a default, so Java wants to be told which.
    }

    @Override
    public void close() {
        // Nothing is held.
    }

    /** Put a name and leave room for the numbers that follow it. */
    private static ByteBuffer withName(ByteBuffer buffer, String name) {
        byte[] bytes = name.getBytes(StandardCharsets.UTF_8);
        return withRoom(buffer, Short.BYTES + bytes.length + 2 * Double.BYTES)
                .putShort((short) bytes.length)
                .put(bytes);
    }

    private static String getName(ByteBuffer from) {
        int length = from.getShort();
        String name = new String(from.array(), from.position(), length, StandardCharsets.UTF_8);
        from.position(from.position() + length);
        return name;
    }

    private static ByteBuffer withRoom(ByteBuffer buffer, int bytes) {
        return buffer.remaining() >= bytes
                ? buffer
                : ByteBuffer.allocate(2 * buffer.capacity() + bytes).put(buffer.flip());
    }
}
