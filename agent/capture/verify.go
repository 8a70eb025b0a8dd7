package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Verify reads rules and settings back from the kernel and compares them with
// what Apply writes. It returns nil only when they are exactly that, an error
// that wraps ErrNotCaptured and names the first difference when they are not,
// and another error when they could not be read. It does not look at tables
// of others.
func (n *NS) Verify() error {
	n.apply.Lock()
	defer n.apply.Unlock()
	return n.verify()
}

func (n *NS) verify() error {
	found, err := n.findTable()
	if err != nil {
		return err
	}
	switch {
	case found == nil:
		return n.differs("table inet %s is missing", tableName)
	case found.Flags != 0:
		return n.differs("table inet %s has flags %#x, so it may be dormant", tableName, found.Flags)
	}
	if err := n.verifyChains(); err != nil {
		return err
	}
	rules, err := n.readRules()
	if err != nil {
		return err
	}
	for _, want := range ruleset() {
		if err := n.verifyRules(want, rules); err != nil {
			return err
		}
	}
	saved, err := n.saved()
	if err != nil {
		return err
	}
	if saved == nil {
		return n.differs("chain %s does not hold the settings from before", savedChain)
	}
	now, err := n.readSettings()
	if err != nil {
		return err
	}
	want := wanted(saved)
	for _, name := range settingNames {
		if now[name] != want[name] {
			return n.differs("net.ipv4.%s is %q, want %q", name, now[name], want[name])
		}
	}
	return nil
}

func (n *NS) differs(format string, args ...any) error {
	return fmt.Errorf("capture: %s: %w: %s", n.path, ErrNotCaptured, fmt.Sprintf(format, args...))
}

func (n *NS) findTable() (*nftables.Table, error) {
	c, err := n.nft()
	if err != nil {
		return nil, err
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("capture: %s: list tables: %w", n.path, err)
	}
	for _, t := range tables {
		if t.Name == tableName && t.Family == nftables.TableFamilyINet {
			return t, nil
		}
	}
	return nil, nil
}

func (n *NS) verifyChains() error {
	c, err := n.nft()
	if err != nil {
		return err
	}
	all, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("capture: %s: list chains: %w", n.path, err)
	}
	want := map[string]*nftables.Chain{}
	for _, ch := range append(ruleset(), chain{name: savedChain}) {
		want[ch.name] = ch.chain()
	}
	for _, got := range all {
		if got.Table.Name != tableName {
			continue
		}
		w := want[got.Name]
		if w == nil {
			return n.differs("chain %s does not belong there", got.Name)
		}
		if got.Type != w.Type || !same(got.Hooknum, w.Hooknum) || !same(got.Priority, w.Priority) || !same(got.Policy, w.Policy) {
			return n.differs("chain %s has another type, hook, priority or policy", got.Name)
		}
		delete(want, got.Name)
	}
	for name := range want {
		return n.differs("chain %s is missing", name)
	}
	return nil
}

func same[T comparable](a, b *T) bool {
	return a == b || a != nil && b != nil && *a == *b
}

func (n *NS) verifyRules(want chain, all []rawRule) error {
	var got []rawRule
	for _, r := range all {
		if r.chain == want.name {
			got = append(got, r)
		}
	}
	if len(got) != len(want.rules) {
		return n.differs("chain %s has %d rules, want %d", want.name, len(got), len(want.rules))
	}
	for i, w := range want.rules {
		if !slices.Equal(got[i].userData, comment(w.comment)) || !sameExprs(got[i].exprs, w.exprs) {
			return n.differs("chain %s: rule %d (%s) was altered", want.name, i+1, w.comment)
		}
	}
	return nil
}

// sameExprs compares the kernel's expressions with ours, one by one.
func sameExprs(got []rawExpr, want []expr.Any) bool {
	if len(got) != len(want) {
		return false
	}
	for i, w := range want {
		b, err := expr.Marshal(byte(table.Family), w)
		if err != nil {
			return false
		}
		wire, err := parseExpr(b)
		if err != nil || wire.name != got[i].name {
			return false
		}
		g := reflect.New(reflect.TypeOf(w).Elem()).Interface().(expr.Any)
		if err := expr.Unmarshal(byte(table.Family), got[i].data, g); err != nil || !reflect.DeepEqual(g, w) {
			return false
		}
	}
	return true
}

// rawRule is a rule as the kernel tells it. The library's own reader is not
// used because it leaves out expressions that it does not know, which would
// let an altered rule pass.
type rawRule struct {
	chain    string
	handle   uint64
	exprs    []rawExpr
	userData []byte
}

type rawExpr struct {
	name string
	data []byte
}

// readRules returns the table's rules in order; none if there is no table.
func (n *NS) readRules() ([]rawRule, error) {
	rules, err := n.dumpRules()
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("capture: %s: read rules: %w", n.path, err)
	}
	return rules, nil
}

func (n *NS) dumpRules() ([]rawRule, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: n.fd()})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: []byte(tableName + "\x00")},
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
		Data: append([]byte{byte(table.Family), 0, 0, 0}, attrs...),
	})
	if err != nil {
		return nil, err
	}
	var out []rawRule
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

func parseRule(b []byte) (r rawRule, err error) {
	ad, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return r, err
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_RULE_CHAIN:
			r.chain = ad.String()
		case unix.NFTA_RULE_HANDLE:
			r.handle = ad.Uint64()
		case unix.NFTA_RULE_USERDATA:
			r.userData = ad.Bytes()
		case unix.NFTA_RULE_EXPRESSIONS:
			ad.Nested(func(list *netlink.AttributeDecoder) error {
				for list.Next() {
					e, err := parseExpr(list.Bytes())
					if err != nil {
						return err
					}
					r.exprs = append(r.exprs, e)
				}
				return nil
			})
		}
	}
	return r, ad.Err()
}

func parseExpr(b []byte) (e rawExpr, err error) {
	ad, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return e, err
	}
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_EXPR_NAME:
			e.name = ad.String()
		case unix.NFTA_EXPR_DATA:
			e.data = ad.Bytes()
		}
	}
	return e, ad.Err()
}
