package clock

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// teller makes this program say what its clocks are, a line for each it reads.
const teller = "SIGNET_TEST_CLOCK_TELLER"

func TestMain(m *testing.M) {
	if os.Getenv(teller) == "" {
		os.Exit(m.Run())
	}
	began := time.Now()
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		now := time.Now()
		fmt.Println(now.Unix(), now.Sub(began).Seconds())
	}
}

// told is a program that says what its clocks are, as seen from its start.
type told struct {
	cmd *exec.Cmd
	ask func() (wall time.Time, timers time.Duration)
	end func()
}

func tell(t *testing.T) told {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), teller+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	return told{cmd: cmd, ask: func() (time.Time, time.Duration) {
		t.Helper()
		fmt.Fprintln(in)
		if !lines.Scan() {
			t.Fatal("the program ended")
		}
		var (
			unix int64
			mono float64
		)
		if _, err := fmt.Sscan(lines.Text(), &unix, &mono); err != nil {
			t.Fatal(err)
		}
		return time.Unix(unix, 0), time.Duration(mono * float64(time.Second))
	}, end: func() {
		t.Helper()
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}}
}

// TestMove: the wall clock of another program moves by what was said, ahead, back
// and right again; its monotonic clock does not, nor does the wall clock here.
func TestMove(t *testing.T) {
	began, p := time.Now(), tell(t)
	for _, off := range []time.Duration{0, time.Hour, -5 * time.Minute, 10 * time.Second, 0} {
		if err := Move(p.cmd.Process.Pid, off); err != nil {
			t.Fatal(err)
		}
		wall, timers := p.ask()
		if late := wall.Sub(time.Now().Add(off)).Abs(); late > 3*time.Second {
			t.Errorf("moved by %s: its wall clock is %s off from that", off, late)
		}
		if most := time.Since(began) + time.Second; timers < 0 || timers > most {
			t.Errorf("moved by %s: its monotonic clock says %s since its start, want at most %s", off, timers, most)
		}
	}
	if err := Move(p.cmd.Process.Pid, time.Millisecond); err == nil {
		t.Error("a fraction of a second was taken")
	}
	p.end()
}

// TestStand: the timers of a program that was stopped for some seconds go on from
// where they were, and its wall clock is right, or off by what it is moved by.
func TestStand(t *testing.T) {
	p := tell(t)
	pid := p.cmd.Process.Pid
	_, before := p.ask()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	const still = 3 * time.Second
	time.Sleep(still)
	if err := Stand(pid, still); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	for _, off := range []time.Duration{0, time.Hour} {
		if off != 0 {
			if err := Move(pid, off); err != nil {
				t.Fatal(err)
			}
		}
		wall, timers := p.ask()
		if late := wall.Sub(time.Now().Add(off)).Abs(); late > 2*time.Second {
			t.Errorf("its wall clock is %s off from what it should be", late)
		}
		if went := timers - before; went < 0 || went > 2*time.Second {
			t.Errorf("its timers went on by %s while it was stopped for %s", went, still)
		}
	}
	p.end()
}
