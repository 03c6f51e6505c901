package osdns

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	vnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tableFlagOwner is NFT_TABLE_F_OWNER (linux/netfilter/nf_tables.h, since 5.12): the table belongs to the netlink socket that made it, goes
// with it, survives others' "flush ruleset" and refuses their edits.
const tableFlagOwner = 0x2

// Capture is the table in the kernel. It holds the netlink socket that owns the table: the kernel removes the table when this process
// ends, however it ends.
type Capture struct {
	name string

	conn  *nftables.Conn // nil while there is no table
	table *nftables.Table
	chain *nftables.Chain
	now   []Redirect
}

// NewCapture returns a capture that is not in force; its table will have this name.
func NewCapture(table string) *Capture { return &Capture{name: table} }

// Probe says why nftables with owned tables does not work here, or nil.
func Probe(table string) error {
	c := NewCapture(table)
	if err := c.open(); err != nil {
		return err
	}
	return c.Set(nil)
}

// Set makes redirects the rules in force; none removes the table. A change of rules is one transaction. Queries of sockets that were in
// use before are treated by the new rules too.
func (c *Capture) Set(redirects []Redirect) error {
	if len(redirects) == 0 {
		return c.close()
	}
	if c.conn != nil && slices.Equal(c.now, redirects) {
		return nil
	}
	if err := c.open(); err != nil {
		return err
	}
	c.conn.FlushChain(c.chain)
	for _, exprs := range rules(redirects) {
		c.conn.AddRule(&nftables.Rule{Table: c.table, Chain: c.chain, Exprs: exprs})
	}
	if err := c.conn.Flush(); err != nil {
		return fmt.Errorf("set dns rules: %w", errors.Join(err, c.close()))
	}
	old := c.now
	c.now = slices.Clone(redirects)
	forget(slices.Concat(old, redirects))
	return nil
}

// open makes the table with an empty chain, which changes nothing yet.
func (c *Capture) open() error {
	if c.conn != nil {
		return nil
	}
	var nl *netlink.Conn
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(s *netlink.Conn) error {
		nl = s
		return nil
	}))
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	table := &nftables.Table{Name: c.name, Family: nftables.TableFamilyINet}
	if err := createOwned(nl, table); err != nil {
		conn.CloseLasting()
		return fmt.Errorf("create nftables table %s: %w", c.name, err)
	}
	chain := conn.AddChain(&nftables.Chain{
		Name: chainName, Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookOutput, Priority: priority,
	})
	if err := conn.Flush(); err != nil {
		conn.CloseLasting() // the table goes with it
		return fmt.Errorf("create nftables chain: %w", err)
	}
	c.conn, c.table, c.chain = conn, table, chain
	return nil
}

// close removes the table.
func (c *Capture) close() error {
	if c.conn == nil {
		return nil
	}
	c.conn.DelTable(c.table)
	err := c.conn.Flush()
	// Closing the socket removes the table even where deleting it failed.
	err = errors.Join(err, c.conn.CloseLasting())
	old := c.now
	c.conn, c.table, c.chain, c.now = nil, nil, nil, nil
	forget(old)
	if err != nil {
		return fmt.Errorf("remove dns rules: %w", err)
	}
	return nil
}

// createOwned makes the table. The library sends table flags as 0 whatever Table.Flags says (v0.3.0), so this one message is ours.
func createOwned(nl *netlink.Conn, t *nftables.Table) error {
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: append([]byte(t.Name), 0)},
		{Type: unix.NFTA_TABLE_FLAGS, Data: []byte{0, 0, 0, tableFlagOwner}}, // big-endian
	})
	if err != nil {
		return err
	}
	const subsys = unix.NFNL_SUBSYS_NFTABLES << 8
	batch := []netlink.Message{
		{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_BEGIN, Flags: netlink.Request}, Data: nfgen(0, unix.NFNL_SUBSYS_NFTABLES)},
		{Header: netlink.Header{Type: subsys | unix.NFT_MSG_NEWTABLE, Flags: netlink.Request | netlink.Acknowledge | netlink.Create | netlink.Excl}, Data: append(nfgen(byte(t.Family), 0), attrs...)},
		{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_END, Flags: netlink.Request}, Data: nfgen(0, unix.NFNL_SUBSYS_NFTABLES)},
	}
	if _, err := nl.SendMessages(batch); err != nil {
		return err
	}
	_, err = nl.Receive() // the acknowledgement, or the kernel's error
	return err
}

// nfgen is a struct nfgenmsg.
func nfgen(family byte, resID uint16) []byte {
	return []byte{family, unix.NFNETLINK_V0, byte(resID >> 8), byte(resID)}
}

// forget drops what conntrack remembers of queries to these resolvers: address translation is decided once for a pair of sockets, so
// a program that keeps its socket (a forwarder, say) would stay with the old decision for as long as it asks. Without the module for
// it (nf_conntrack_netlink) only that is lost.
func forget(rs []Redirect) {
	if len(rs) == 0 {
		return
	}
	q := make(queriesTo, len(rs))
	for _, r := range rs {
		q[r.Resolver] = true
	}
	_, _ = vnetlink.ConntrackDeleteFilters(vnetlink.ConntrackTable, unix.AF_INET, q)
	_, _ = vnetlink.ConntrackDeleteFilters(vnetlink.ConntrackTable, unix.AF_INET6, q)
}

type queriesTo map[netip.Addr]bool

// MatchConntrackFlow implements vnetlink.CustomConntrackFilter.
func (q queriesTo) MatchConntrackFlow(f *vnetlink.ConntrackFlow) bool {
	if f.Forward.Protocol != unix.IPPROTO_UDP || f.Forward.DstPort != Port {
		return false
	}
	a, ok := netip.AddrFromSlice(f.Forward.DstIP)
	return ok && q[a.Unmap()]
}
