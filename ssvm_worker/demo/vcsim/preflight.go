package main

import (
	"net"
	"slices"
	"strconv"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// authorization answers as if the user lacked some privileges.
type authorization struct {
	mo.AuthorizationManager
	lacks []string
}

// HasUserPrivilegeOnEntities grants all but what is lacking.
func (a *authorization) HasUserPrivilegeOnEntities(req *types.HasUserPrivilegeOnEntities) soapFault {
	var found []types.EntityPrivilege
	for _, entity := range req.Entities {
		it := types.EntityPrivilege{Entity: entity}
		for _, id := range req.PrivId {
			granted := !slices.Contains(a.lacks, id)
			it.PrivAvailability = append(it.PrivAvailability, types.PrivilegeAvailability{PrivId: id, IsGranted: granted})
		}
		found = append(found, it)
	}
	return &methods.HasUserPrivilegeOnEntitiesBody{Res: &types.HasUserPrivilegeOnEntitiesResponse{Returnval: found}}
}

// nameHosts lets every ESXi host be reached where the simulator is, or where a fault says; its leases do too.
func (w *world) nameHosts(now faults) {
	address, print := w.address, w.thumbprint
	if now.Host != "" {
		address = now.Host
	}
	if now.HostThumbprint != "" {
		print = now.HostThumbprint
	}
	name, port, _ := net.SplitHostPort(address)
	number, _ := strconv.Atoi(port)
	for _, each := range w.registry.All("HostSystem") {
		host := each.(*simulator.HostSystem)
		host.Summary.Config.Name, host.Summary.Config.Port = name, int32(number)
		host.Summary.Config.SslThumbprint = print
	}
}
