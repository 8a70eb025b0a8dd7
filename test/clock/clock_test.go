package clock

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strconv"
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

// TestMove: the wall clock of another program moves by what was said, ahead, back
// and right again; its monotonic clock does not, nor does the wall clock here.
func TestMove(t *testing.T) {
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
	began, lines := time.Now(), bufio.NewScanner(out)
	for _, off := range []time.Duration{0, time.Hour, -5 * time.Minute, 10 * time.Second, 0} {
		if err := Move(cmd.Process.Pid, off); err != nil {
			t.Fatal(err)
		}
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
		if late := time.Unix(unix, 0).Sub(time.Now().Add(off)).Abs(); late > 3*time.Second {
			t.Errorf("moved by %s: its wall clock is %s off from that", off, late)
		}
		if most := time.Since(began).Seconds() + 1; mono < 0 || mono > most {
			t.Errorf("moved by %s: its monotonic clock says %ss since its start, want at most %.1f", off, strconv.FormatFloat(mono, 'f', 1, 64), most)
		}
	}
	if err := Move(cmd.Process.Pid, time.Millisecond); err == nil {
		t.Error("a fraction of a second was taken")
	}
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
