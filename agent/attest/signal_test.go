package attest

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Only processes in a container of that pod are signalled, only those that run
// exactly that program, only those that handle the signal, and not the children of
// one that does.
func TestSignalPod(t *testing.T) {
	b := newBench(t)
	k := newKubepods(t)
	in := "kubepods/pod" + podUID + "/c1"
	mine, other, forged, stranger := b.start("signalled", b.self), b.start("signalled", b.self), b.start("signalled", b.self), b.start("signalled", b.self)
	k.move(mine, in)
	k.move(other, "kubepods/pod"+otherUID+"/c1")
	k.move(forged, "kubepods/pod"+otherUID+"/c1/kubepods/pod"+podUID+"/c1") // the other pod's
	deaf := b.start("exec", b.self)
	k.move(deaf, in)
	deaf.step()
	deaf.waitExec("/bin/cat")
	b.copyTo(b.self, b.dir+"/another")
	family := b.start("family", b.dir+"/another")
	k.move(family, in)
	family.step()
	family.expect("child ready")

	signal := func(uid, program string, want int) {
		t.Helper()
		if sent, err := SignalPod(t.Context(), uid, program, unix.SIGHUP); err != nil || sent != want {
			t.Errorf("pod %q, program %s: told %d, %v; want %d", uid, program, sent, err, want)
		}
	}
	signal(podUID, b.self, 1)
	mine.expect("signal")
	signal(otherUID, b.self, 2)
	other.expect("signal")
	forged.expect("signal")
	signal(podUID, b.dir+"/another", 1)
	family.expect("the parent was signalled")
	signal(podUID, "trusted", 0)
	signal(podUID, b.dir, 0)
	signal(podUID, "/usr/bin/cat", 0)
	signal("11111111-6c1f-4f3e-9c55-2f0a6a4f1d77", b.self, 0)
	signal("", b.self, 0)

	time.Sleep(100 * time.Millisecond)
	for c, want := range map[*child]string{mine: "signals: 1", other: "signals: 1", forged: "signals: 1", stranger: "signals: 0"} {
		c.step()
		c.expect(want)
	}
	if _, err := deaf.in.Write([]byte("alive\n")); err != nil { // cat repeats what it reads
		t.Fatal(err)
	}
	deaf.expect("alive")
}
