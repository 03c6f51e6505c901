// Package redirect owns the nftables rules in a pod's network namespace that send a port's traffic to the agent.
package redirect

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

// Table is the name of the one table (family inet) that doppel owns in a pod.
const Table = "doppel"

// Rule sends what arrives for port From to port To of the same protocol.
type Rule struct {
	Protocol string // TCP or UDP
	From, To uint16
}

// exprs builds one rule. What comes in over lo is left alone: the pod's own processes keep talking to the app.
//
//	iifname != "lo" meta l4proto tcp th dport 3000 redirect to :9901
func (r Rule) exprs() []expr.Any {
	l4 := byte(unix.IPPROTO_TCP)
	if r.Protocol == "UDP" {
		l4 = unix.IPPROTO_UDP
	}
	lo := make([]byte, unix.IFNAMSIZ)
	copy(lo, "lo")
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: lo},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{l4}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(r.From)},
		&expr.Counter{},
		&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(r.To)},
		&expr.Redir{RegisterProtoMin: 1},
	}
}

// Apply replaces doppel's table in the current network namespace by one with the given rules, atomically; no rules removes it.
func Apply(rules []Rule) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	table := &nftables.Table{Name: Table, Family: nftables.TableFamilyINet}
	c.AddTable(table) // so that the deletion that follows cannot fail
	c.DelTable(table)
	if len(rules) > 0 {
		c.AddTable(table)
		chain := c.AddChain(&nftables.Chain{
			Name: "prerouting", Table: table, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest,
		})
		for _, r := range rules {
			c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: r.exprs()})
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("set nftables rules: %w", err)
	}
	return nil
}

// Rules lists the rules that an agent's configuration asks for.
func Rules(cfg *agentcfg.Config) []Rule {
	var rules []Rule
	for _, p := range cfg.Ports {
		if p.Way == agentcfg.ByRedirect {
			rules = append(rules, Rule{Protocol: p.Protocol, From: p.ContainerPort, To: p.AgentPort})
		}
	}
	return rules
}
