package capture

import (
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/capture/nft"
	"github.com/signet-mesh/signet/internal/lab"
)

// tamper changes the table behind Apply's back.
func tamper(t *testing.T, p *lab.Pod, f func(c *nftables.Conn, rules []nft.RawRule)) {
	t.Helper()
	n := open(t, p)
	rules, err := n.readRules()
	if err != nil {
		t.Fatal(err)
	}
	c, err := n.nft()
	if err != nil {
		t.Fatal(err)
	}
	f(c, rules)
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
}

func notInPlace(t *testing.T, p *lab.Pod, what string) {
	t.Helper()
	if err := Verify(p.NetNS, opts); !errors.Is(err, ErrNotCaptured) {
		t.Errorf("%s: Verify returned %v", what, err)
	} else {
		t.Logf("%s: %v", what, err)
	}
}

// Defends: status tells the truth. Every way of tampering is noticed, and the
// next Apply repairs it.
func TestVerify(t *testing.T) {
	p := newPair(t)
	notInPlace(t, p.a, "never applied")
	at := func(name string) *nftables.Chain { return &nftables.Chain{Name: name, Table: table} }
	type step struct {
		name string
		do   func(c *nftables.Conn, rules []nft.RawRule)
	}
	var steps []step
	for _, ch := range ruleset(opts) {
		for i, r := range ch.Rules {
			// The i-th rule of the chain, as it is in the kernel.
			handle := func(rules []nft.RawRule) uint64 {
				k := 0
				for _, r := range rules {
					if r.Chain == ch.Name {
						if k == i {
							return r.Handle
						}
						k++
					}
				}
				t.Fatal("no such rule")
				return 0
			}
			replace := func(c *nftables.Conn, rules []nft.RawRule, e []expr.Any, text string) {
				c.ReplaceRule(&nftables.Rule{Table: table, Chain: at(ch.Name), Handle: handle(rules), Exprs: e, UserData: nft.Comment(text)})
			}
			where := ch.Name + ", rule " + string(rune('1'+i)) + ": "
			steps = append(steps,
				step{where + "removed", func(c *nftables.Conn, rules []nft.RawRule) {
					if err := c.DelRule(&nftables.Rule{Table: table, Chain: at(ch.Name), Handle: handle(rules)}); err != nil {
						t.Fatal(err)
					}
				}},
				step{where + "last expression dropped", func(c *nftables.Conn, rules []nft.RawRule) {
					replace(c, rules, r.Exprs[:len(r.Exprs)-1], r.Comment)
				}},
				step{where + "comparison inverted", func(c *nftables.Conn, rules []nft.RawRule) {
					e := append([]expr.Any{}, r.Exprs...)
					cmp := *e[1].(*expr.Cmp)
					cmp.Op ^= 1
					e[1] = &cmp
					replace(c, rules, e, r.Comment)
				}},
			)
			if ch.Hook == nftables.ChainHookPostrouting { // it has no such expression
				continue
			}
			// The netlink library does not know this expression and leaves it
			// out when it reads the rule.
			steps = append(steps, step{where + "unknown condition added", func(c *nftables.Conn, rules []nft.RawRule) {
				e := append([]expr.Any{&expr.Socket{Key: expr.SocketKeyWildcard, Register: 1}}, r.Exprs...)
				replace(c, rules, e, r.Comment)
			}})
		}
		steps = append(steps,
			step{ch.Name + ": accepting rule in front", func(c *nftables.Conn, _ []nft.RawRule) {
				c.InsertRule(&nftables.Rule{Table: table, Chain: at(ch.Name), Exprs: nft.Done()})
			}},
			step{ch.Name + ": rule added", func(c *nftables.Conn, _ []nft.RawRule) {
				c.AddRule(&nftables.Rule{Table: table, Chain: at(ch.Name), Exprs: nft.Done()})
			}},
			step{ch.Name + ": policy drop", func(c *nftables.Conn, _ []nft.RawRule) {
				if ch.Kind == nftables.ChainTypeNAT {
					c.FlushChain(at(ch.Name)) // a nat chain's policy cannot be drop
					return
				}
				drop := nftables.ChainPolicyDrop
				changed := ch.In(table)
				changed.Policy = &drop
				c.AddChain(changed)
			}},
		)
	}
	steps = append(steps,
		step{"chain added", func(c *nftables.Conn, _ []nft.RawRule) {
			c.AddChain(&nftables.Chain{Name: "other", Table: table, Type: nftables.ChainTypeFilter,
				Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFirst})
		}},
		step{"table removed", func(c *nftables.Conn, _ []nft.RawRule) { c.DelTable(table) }},
		step{"saved settings removed", func(c *nftables.Conn, _ []nft.RawRule) { c.FlushChain(at(savedChain)) }},
		step{"saved settings altered", func(c *nftables.Conn, _ []nft.RawRule) {
			c.AddRule(&nftables.Rule{Table: table, Chain: at(savedChain), Exprs: nft.Done(), UserData: nft.Comment(";x=1")})
		}},
		step{"saved settings malformed", func(c *nftables.Conn, _ []nft.RawRule) {
			c.FlushChain(at(savedChain))
			c.AddRule(&nftables.Rule{Table: table, Chain: at(savedChain), Exprs: nft.Done(), UserData: []byte{byte(userdata.TypeComment), 200, 'x'}})
		}},
	)
	for _, s := range steps {
		apply(t, p.a) // repairs the step before
		tamper(t, p.a, s.do)
		notInPlace(t, p.a, s.name)
	}
	apply(t, p.a)
	makeDormant(t, p.a)
	notInPlace(t, p.a, "table dormant")
	apply(t, p.a)
	for _, name := range settingNames {
		err := p.a.Do(func() error {
			return os.WriteFile(settingPath(name), []byte(map[string]string{
				reservedPorts: "15001\n", portRange: "2000 3000\n", reuseWaiting: "0\n", migrateRequests: "0\n",
			}[name]), 0)
		})
		if err != nil {
			t.Fatal(err)
		}
		notInPlace(t, p.a, name)
		apply(t, p.a)
	}
}

// makeDormant switches the whole table off without changing a rule. The
// netlink library cannot set a table's flags.
func makeDormant(t *testing.T, p *lab.Pod) {
	t.Helper()
	n := open(t, p)
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: n.fd()})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const dormant = 1
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: []byte(tableName + "\x00")},
		{Type: unix.NFTA_TABLE_FLAGS, Data: []byte{0, 0, 0, dormant}},
	})
	if err != nil {
		t.Fatal(err)
	}
	limit := []byte{0, 0, 0, unix.NFNL_SUBSYS_NFTABLES}
	_, err = conn.SendMessages([]netlink.Message{
		{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_BEGIN, Flags: netlink.Request}, Data: limit},
		{
			Header: netlink.Header{
				Type:  unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWTABLE,
				Flags: netlink.Request | netlink.Acknowledge,
			},
			Data: append([]byte{byte(table.Family), 0, 0, 0}, attrs...),
		},
		{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_END, Flags: netlink.Request}, Data: limit},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Receive(); err != nil {
		t.Fatal(err)
	}
}

// A second Apply changes nothing: the kernel's handles stay.
func TestApply_twice(t *testing.T) {
	p := newPair(t)
	apply(t, p.a)
	n := open(t, p.a)
	first, err := n.readRules()
	if err != nil {
		t.Fatal(err)
	}
	apply(t, p.a)
	second, err := n.readRules()
	if err != nil || len(first) == 0 || !reflect.DeepEqual(first, second) {
		t.Fatalf("rules changed (%v):\n%v\n%v", err, first, second)
	}
	if err := Verify(p.b.NetNS, opts); !errors.Is(err, ErrNotCaptured) {
		t.Fatalf("the other pod: %v", err)
	}
}

// Remove leaves the namespace as it was before the first Apply, although the
// rules were altered and applied again in between, and long lists are kept.
func TestRemove(t *testing.T) {
	p := newPair(t)
	var ports []string
	for port := 20000; port < 20200; port += 2 {
		ports = append(ports, strings.TrimSpace(reserve("", port)))
	}
	set := func(name, value string) {
		t.Helper()
		if err := p.a.Do(func() error { return os.WriteFile(settingPath(name), []byte(value+"\n"), 0) }); err != nil {
			t.Fatal(err)
		}
	}
	set(reservedPorts, strings.Join(ports, ","))
	set(portRange, "30000 50000")
	set(reuseWaiting, "0")
	n := open(t, p.a)
	before, err := n.readSettings()
	if err != nil {
		t.Fatal(err)
	}
	apply(t, p.a)
	now, err := n.readSettings()
	if err != nil || !strings.HasPrefix(now[reservedPorts], "15001,15006,15008,20000,") || now[portRange] != "1024 65535" || now[reuseWaiting] != "1" {
		t.Fatalf("settings: %v, %v", now, err)
	}
	without(t, p.a, "output_nat", "outbound")
	apply(t, p.a)
	for range 2 { // idempotent
		if err := Remove(p.a.NetNS); err != nil {
			t.Fatal(err)
		}
		after, err := n.readSettings()
		if err != nil || !reflect.DeepEqual(before, after) {
			t.Fatalf("settings: %v (%v), want %v", after, err, before)
		}
		if tb, err := n.findTable(); err != nil || tb != nil {
			t.Fatalf("table: %v, %v", tb, err)
		}
	}
	// An empty list is restored too.
	set(reservedPorts, "")
	apply(t, p.a)
	if err := Remove(p.a.NetNS); err != nil {
		t.Fatal(err)
	}
	if after, err := n.readSettings(); err != nil || after[reservedPorts] != "" {
		t.Fatalf("reserved: %q, %v", after[reservedPorts], err)
	}
}

// Defends the settings of a pod against a flush of all rules, which takes along
// what was kept there of the time before: who remembers it has it restored, but
// for what has been set anew since.
func TestRemove_afterAFlush(t *testing.T) {
	p := newPair(t)
	set := func(name, value string) {
		t.Helper()
		if err := p.a.Do(func() error { return os.WriteFile(settingPath(name), []byte(value+"\n"), 0) }); err != nil {
			t.Fatal(err)
		}
	}
	set(portRange, "30000 50000")
	set(reservedPorts, "20000")
	n := open(t, p.a)
	before, err := n.readSettings()
	if err != nil {
		t.Fatal(err)
	}
	o := opts
	for _, renewed := range []string{"", "0"} {
		apply(t, p.a)
		if o.Originals, err = OriginalsOf(p.a.NetNS); err != nil || !reflect.DeepEqual(o.Originals.values, before) {
			t.Fatalf("remembered %v, %v, want %v", o.Originals, err, before)
		}
		tamper(t, p.a, func(c *nftables.Conn, _ []nft.RawRule) { c.FlushRuleset() })
		if renewed != "" {
			set(reuseWaiting, renewed)
			before[reuseWaiting] = renewed
		}
		if err := Apply(p.a.NetNS, o); err != nil {
			t.Fatal(err)
		}
		if err := Remove(p.a.NetNS); err != nil {
			t.Fatal(err)
		}
		if after, err := n.readSettings(); err != nil || !reflect.DeepEqual(before, after) {
			t.Fatalf("settings: %v (%v), want %v", after, err, before)
		}
	}
	// Nothing is remembered of a namespace that is not captured.
	if got, err := OriginalsOf(p.a.NetNS); err != nil || got.values != nil {
		t.Errorf("remembered %v, %v", got, err)
	}
}

// Settings and rules of one pod are no business of another.
func TestApply_onlyThere(t *testing.T) {
	p := newPair(t)
	b := open(t, p.b)
	before, err := b.readSettings()
	if err != nil {
		t.Fatal(err)
	}
	var own [2]string
	own[0] = hostSetting(t, portRange)
	apply(t, p.a)
	own[1] = hostSetting(t, portRange)
	after, err := b.readSettings()
	if err != nil || !reflect.DeepEqual(before, after) || own[0] != own[1] {
		t.Fatalf("pod b: %v, %v (%v); own: %v", before, after, err, own)
	}
}

func hostSetting(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(settingPath(name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestReserve(t *testing.T) {
	for _, c := range []struct{ list, want string }{
		{"", "15001,15006,15008"},
		{"80", "80,15001,15006,15008"},
		{"15000,15002", "15000-15002,15006,15008"},
		{"15001-15010", "15001-15010"},
		{"60000-60010,1-3", "1-3,15001,15006,15008,60000-60010"},
		{"15006", "15001,15006,15008"},
		{"15007", "15001,15006-15008"},
		{"junk,7", "7,15001,15006,15008"},
	} {
		if got := reserve(c.list, 15001, 15006, 15008); got != c.want {
			t.Errorf("%q: got %q, want %q", c.list, got, c.want)
		}
	}
}

func TestParseSocket_malformed(t *testing.T) {
	if _, err := parseSocket(make([]byte, diagAnswerLen-1)); err == nil {
		t.Error("a short answer was taken")
	}
}
