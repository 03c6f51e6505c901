package osdns

import (
	"encoding/binary"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// chainName is the one chain of the table.
const chainName = "output"

// priority is before all others' destination NAT (-100), Docker's of its embedded resolver among them: the first NAT rule that
// matches decides for the connection.
var priority = nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest - 1)

// rules are the expressions of each rule, in order: what is marked passes; UDP and TCP queries to a resolver go to the listener.
func rules(redirects []Redirect) [][]expr.Any {
	out := [][]expr.Any{{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(Mark)},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}}
	for _, r := range redirects {
		for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			out = append(out, redirectRule(r, proto))
		}
	}
	return out
}

// redirectRule is "ip daddr RESOLVER PROTO dport 53 dnat to LISTENER", or its like with ip6, behind "oifname LINK" if it has one. Destination NAT in the output hook works
// whatever the interface the query would have left by: it goes to lo instead, and the answer comes back from the resolver's address.
func redirectRule(r Redirect, proto byte) []expr.Any {
	family, offset := byte(unix.NFPROTO_IPV4), uint32(16) // of the destination in the header, RFC 791
	if r.Resolver.Is6() {
		family, offset = unix.NFPROTO_IPV6, 24 // RFC 8200
	}
	addr, to := r.Resolver.AsSlice(), r.To.Addr().AsSlice()
	var link []expr.Any
	if r.Link != "" {
		name := make([]byte, unix.IFNAMSIZ)
		copy(name, r.Link)
		link = []expr.Any{
			&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name},
		}
	}
	return append(link, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(len(addr))},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: addr},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, Port)},
		&expr.Immediate{Register: 1, Data: to},
		&expr.Immediate{Register: 2, Data: binary.BigEndian.AppendUint16(nil, r.To.Port())},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(family), RegAddrMin: 1, RegProtoMin: 2, Specified: true},
	}...)
}
