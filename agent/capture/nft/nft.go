// Package nft writes tables of packet filter rules and reads them back, so that
// what the kernel has can be compared, to the bit, with what was written.
package nft

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Chain is one chain of a table with its rules, in order. Without a Hook it is
// attached to nothing.
type Chain struct {
	Name     string
	Kind     nftables.ChainType
	Hook     *nftables.ChainHook
	Priority *nftables.ChainPriority
	Rules    []Rule
}

// Rule is one rule: a comment, at most 200 bytes, and what it does.
type Rule struct {
	Comment string
	Exprs   []expr.Any
}

// In returns the chain as the netlink library wants it.
func (c *Chain) In(t *nftables.Table) *nftables.Chain {
	out := &nftables.Chain{Name: c.Name, Table: t, Type: c.Kind, Hooknum: c.Hook, Priority: c.Priority}
	if c.Hook != nil {
		accept := nftables.ChainPolicyAccept
		out.Policy = &accept
	}
	return out
}

// Add puts chains into the transaction that c gathers.
func Add(c *nftables.Conn, t *nftables.Table, chains []Chain) {
	for _, ch := range chains {
		at := c.AddChain(ch.In(t))
		for _, r := range ch.Rules {
			c.AddRule(&nftables.Rule{Table: t, Chain: at, Exprs: r.Exprs, UserData: Comment(r.Comment)})
		}
	}
}

// Comment is a rule's comment as the kernel keeps it.
func Comment(s string) []byte {
	return userdata.AppendString(nil, userdata.TypeComment, s)
}

// CommentText is the inverse of Comment; "" for anything else. The bytes may
// be of somebody else's making, so the library's reader, which trusts the
// lengths in them, is not used.
func CommentText(b []byte) string {
	if len(b) < 3 || b[0] != byte(userdata.TypeComment) || int(b[1]) != len(b)-2 {
		return ""
	}
	return strings.TrimSuffix(string(b[2:]), "\x00")
}

// Find returns the table as the kernel has it, nil if there is none.
func Find(c *nftables.Conn, t *nftables.Table) (*nftables.Table, error) {
	tables, err := c.ListTablesOfFamily(t.Family)
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", err)
	}
	for _, got := range tables {
		if got.Name == t.Name && got.Family == t.Family {
			return got, nil
		}
	}
	return nil, nil
}

// Differs compares a table in the namespace netns (0 is the caller's own) with
// what it should hold: chains, every rule of those that are not named in
// loose, and nothing else. It returns the first difference, "" if there is
// none. Sets are not looked at.
func Differs(c *nftables.Conn, netns int, t *nftables.Table, chains []Chain, loose ...string) (string, error) {
	found, err := Find(c, t)
	if err != nil {
		return "", err
	}
	switch {
	case found == nil:
		return fmt.Sprintf("table %s %s is missing", family(t), t.Name), nil
	case found.Flags != 0:
		return fmt.Sprintf("table %s %s has flags %#x, so it may be dormant", family(t), t.Name, found.Flags), nil
	}
	if diff, err := differingChain(c, t, chains); diff != "" || err != nil {
		return diff, err
	}
	rules, err := Read(netns, t)
	if err != nil {
		return "", err
	}
	for _, want := range chains {
		if slices.Contains(loose, want.Name) {
			continue
		}
		if diff := want.differs(t, rules); diff != "" {
			return diff, nil
		}
	}
	return "", nil
}

func family(t *nftables.Table) string {
	switch t.Family {
	case nftables.TableFamilyINet:
		return "inet"
	case nftables.TableFamilyBridge:
		return "bridge"
	}
	return fmt.Sprintf("family %d", t.Family)
}

func differingChain(c *nftables.Conn, t *nftables.Table, chains []Chain) (string, error) {
	all, err := c.ListChainsOfTableFamily(t.Family)
	if err != nil {
		return "", fmt.Errorf("list chains: %w", err)
	}
	want := map[string]*nftables.Chain{}
	for _, ch := range chains {
		want[ch.Name] = ch.In(t)
	}
	for _, got := range all {
		if got.Table.Name != t.Name {
			continue
		}
		w := want[got.Name]
		if w == nil {
			return fmt.Sprintf("chain %s does not belong there", got.Name), nil
		}
		if got.Type != w.Type || !same(got.Hooknum, w.Hooknum) || !same(got.Priority, w.Priority) || !same(got.Policy, w.Policy) {
			return fmt.Sprintf("chain %s has another type, hook, priority or policy", got.Name), nil
		}
		delete(want, got.Name)
	}
	for name := range want {
		return fmt.Sprintf("chain %s is missing", name), nil
	}
	return "", nil
}

func same[T comparable](a, b *T) bool {
	return a == b || a != nil && b != nil && *a == *b
}

func (c *Chain) differs(t *nftables.Table, all []RawRule) string {
	var got []RawRule
	for _, r := range all {
		if r.Chain == c.Name {
			got = append(got, r)
		}
	}
	if len(got) != len(c.Rules) {
		return fmt.Sprintf("chain %s has %d rules, want %d", c.Name, len(got), len(c.Rules))
	}
	for i, w := range c.Rules {
		if !slices.Equal(got[i].UserData, Comment(w.Comment)) || !sameExprs(t, got[i].Exprs, w.Exprs) {
			return fmt.Sprintf("chain %s: rule %d (%s) was altered", c.Name, i+1, w.Comment)
		}
	}
	return ""
}

// sameExprs compares the kernel's expressions with ours, one by one.
func sameExprs(t *nftables.Table, got []RawExpr, want []expr.Any) bool {
	if len(got) != len(want) {
		return false
	}
	for i, w := range want {
		b, err := expr.Marshal(byte(t.Family), w)
		if err != nil {
			return false
		}
		wire, err := parseExpr(b)
		if err != nil || wire.Name != got[i].Name {
			return false
		}
		if sameAttributes(wire.Data, got[i].Data) {
			continue
		}
		// The kernel adds attributes that have their usual value.
		g := reflect.New(reflect.TypeOf(w).Elem()).Interface().(expr.Any)
		if err := expr.Unmarshal(byte(t.Family), got[i].Data, g); err != nil || !reflect.DeepEqual(g, w) {
			return false
		}
	}
	return true
}

// sameAttributes compares attributes without regard to their order. The library
// does not read all that it writes (the source register of ct), so bytes come
// before what it reads.
func sameAttributes(a, b []byte) bool {
	x, err1 := sortedAttributes(a)
	y, err2 := sortedAttributes(b)
	return err1 == nil && err2 == nil && reflect.DeepEqual(x, y)
}

func sortedAttributes(b []byte) ([]netlink.Attribute, error) {
	out, err := netlink.UnmarshalAttributes(b)
	slices.SortFunc(out, func(x, y netlink.Attribute) int { return cmp.Compare(x.Type, y.Type) })
	return out, err
}

// RawRule is a rule as the kernel tells it. The library's own reader is not
// used because it leaves out expressions that it does not know, which would
// let an altered rule pass.
type RawRule struct {
	Chain    string
	Handle   uint64
	Exprs    []RawExpr
	UserData []byte
}

// RawExpr is one expression of a rule: its kind and its attributes.
type RawExpr struct {
	Name string
	Data []byte
}

// Read returns the rules of a table in the namespace netns (0 is the caller's
// own), in order; none if there is no table.
func Read(netns int, t *nftables.Table) ([]RawRule, error) {
	rules, err := dump(netns, t)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read rules: %w", err)
	}
	return rules, nil
}

func dump(netns int, t *nftables.Table) ([]RawRule, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: []byte(t.Name + "\x00")},
	})
	if err != nil {
		return nil, err
	}
	// nfgenmsg: family, version, resource id.
	msgs, err := conn.Execute(netlink.Message{
		Header: netlink.Header{
			Type:  unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE,
			Flags: netlink.Request | netlink.Dump,
		},
		Data: append([]byte{byte(t.Family), 0, 0, 0}, attrs...),
	})
	if err != nil {
		return nil, err
	}
	var out []RawRule
	for _, m := range msgs {
		if len(m.Data) < 4 {
			return nil, fmt.Errorf("short answer of %d bytes", len(m.Data))
		}
		r, err := parseRule(m.Data[4:])
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

func parseRule(b []byte) (r RawRule, err error) {
	ad, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return r, err
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_RULE_CHAIN:
			r.Chain = ad.String()
		case unix.NFTA_RULE_HANDLE:
			r.Handle = ad.Uint64()
		case unix.NFTA_RULE_USERDATA:
			r.UserData = ad.Bytes()
		case unix.NFTA_RULE_EXPRESSIONS:
			ad.Nested(func(list *netlink.AttributeDecoder) error {
				for list.Next() {
					e, err := parseExpr(list.Bytes())
					if err != nil {
						return err
					}
					r.Exprs = append(r.Exprs, e)
				}
				return nil
			})
		}
	}
	return r, ad.Err()
}

func parseExpr(b []byte) (e RawExpr, err error) {
	ad, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return e, err
	}
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_EXPR_NAME:
			e.Name = ad.String()
		case unix.NFTA_EXPR_DATA:
			e.Data = ad.Bytes()
		}
	}
	return e, ad.Err()
}
