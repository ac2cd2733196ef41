package main

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// authorization simulates a user without some privileges.
type authorization struct {
	mo.AuthorizationManager
	lacks []string
	// lenient grants all privileges to the session.
	lenient bool
}

// HasUserPrivilegeOnEntities grants all privileges of the user except the lacking ones.
func (a *authorization) HasUserPrivilegeOnEntities(req *types.HasUserPrivilegeOnEntities) soapFault {
	found := granted(req.Entities, req.PrivId, a.lacks)
	return &methods.HasUserPrivilegeOnEntitiesBody{Res: &types.HasUserPrivilegeOnEntitiesResponse{Returnval: found}}
}

// HasPrivilegeOnEntities grants the privileges of a session.
func (a *authorization) HasPrivilegeOnEntities(req *types.HasPrivilegeOnEntities) soapFault {
	lacks := a.lacks
	if a.lenient {
		lacks = nil
	}
	found := granted(req.Entity, req.PrivId, lacks)
	return &methods.HasPrivilegeOnEntitiesBody{Res: &types.HasPrivilegeOnEntitiesResponse{Returnval: found}}
}

// needs contains the privileges of methods.
var needs = map[string][]string{
	"CreateSnapshotEx_Task":   {"VirtualMachine.State.CreateSnapshot"},
	"RemoveSnapshot_Task":     {"VirtualMachine.State.RemoveSnapshot"},
	"ConsolidateVMDisks_Task": {"VirtualMachine.State.RemoveSnapshot"},
	"ExportSnapshot":          {"VApp.Export"},
	"CreateDescriptor":        {"VApp.Export"},
	"QueryChangedDiskAreas":   {"VirtualMachine.Provisioning.DiskRandomRead"},
	"Destroy_Task":            {"VirtualMachine.Inventory.Delete"},
	"RelocateVM_Task":         {"Resource.ColdMigrate"},
	"ImportVApp": {
		"VApp.Import", "Resource.AssignVMToPool", "Datastore.AllocateSpace", "Network.Assign",
		"VirtualMachine.Inventory.Create", "VirtualMachine.Config.AddNewDisk", "VirtualMachine.Config.AddRemoveDevice",
		"VirtualMachine.Config.AdvancedConfig", "VirtualMachine.Config.Settings", "VirtualMachine.Config.CPUCount",
		"VirtualMachine.Config.Memory",
	},
}

// denied returns the fault NoPermission if the user lacks a privilege that the method needs.
func (w *world) denied(method *simulator.Method) types.BaseMethodFault {
	now, _ := w.now()
	if read, ok := method.Body.(*types.RetrievePropertiesEx); ok && !now.SessionHas {
		return unreadable(read, now.Lacks)
	}
	for _, each := range needs[method.Name] {
		if slices.Contains(now.Lacks, each) && !now.SessionHas {
			this := method.This
			return &types.NoPermission{Object: &this, PrivilegeId: each}
		}
	}
	return nil
}

// unreadable returns the fault NoPermission if the user may not read a VM.
func unreadable(read *types.RetrievePropertiesEx, lacks []string) types.BaseMethodFault {
	for _, id := range []string{"System.View", "System.Read"} {
		for _, set := range read.SpecSet {
			for _, each := range set.ObjectSet {
				if slices.Contains(lacks, id) && each.Obj.Type == "VirtualMachine" {
					return &types.NoPermission{Object: &each.Obj, PrivilegeId: id}
				}
			}
		}
	}
	return nil
}

func granted(entities []types.ManagedObjectReference, ids, lacks []string) []types.EntityPrivilege {
	var found []types.EntityPrivilege
	for _, entity := range entities {
		it := types.EntityPrivilege{Entity: entity}
		for _, id := range ids {
			grant := types.PrivilegeAvailability{PrivId: id, IsGranted: !slices.Contains(lacks, id)}
			it.PrivAvailability = append(it.PrivAvailability, grant)
		}
		found = append(found, it)
	}
	return found
}

// nameHosts sets the address and thumbprint of every ESXi host: those of the simulator, or those of a fault.
func (w *world) nameHosts(now faults) {
	license := simulator.EvalLicense
	if now.License != "" {
		license.EditionKey, license.Name = now.License, "License "+now.License
	}
	content := w.registry.Get(serviceInstance).(*simulator.ServiceInstance).Content
	w.registry.Get(*content.LicenseManager).(*simulator.LicenseManager).Licenses = []types.LicenseManagerLicenseInfo{license}
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
		host.Summary.Config.SslThumbprint, host.Summary.Config.SslCertificate = print, ""
		host.Runtime.InMaintenanceMode = now.HostMaintenance
		if now.HostCertificate != "" {
			host.Summary.Config.SslThumbprint = now.HostThumbprint
			host.Summary.Config.SslCertificate = strings.TrimPrefix(now.HostCertificate, "none")
		}
	}
	w.fillStoragePod(now)
	percent := now.DatastoreFree
	if percent == 0 {
		percent = 50
	}
	for _, each := range w.registry.All("Datastore") {
		store := each.(*simulator.Datastore)
		store.Summary.Capacity = 1 << 40
		store.Info.GetDatastoreInfo().MaxVirtualDiskCapacity = now.maxDisk()
		store.Summary.FreeSpace = store.Summary.Capacity / 100 * percent
	}
	for _, each := range w.registry.All("ClusterComputeResource") {
		cluster := each.(*simulator.ClusterComputeResource)
		cluster.ConfigurationEx.(*types.ClusterConfigInfoEx).DrsConfig.Enabled = types.NewBool(now.NoDrs == "")
		for number, ref := range cluster.Host {
			host := w.registry.Get(ref).(*simulator.HostSystem)
			host.Runtime.InMaintenanceMode = number < now.Maintenance || now.HostMaintenance
		}
	}
}

// addStoragePod adds a datastore cluster, which nameHosts fills.
func (w *world) addStoragePod() {
	folder := w.registry.Any("Datacenter").(*simulator.Datacenter).DatastoreFolder
	own := &simulator.Context{Context: context.Background(), Session: &simulator.Session{}, Map: w.registry}
	w.registry.Get(folder).(*simulator.Folder).CreateStoragePod(own, &types.CreateStoragePod{Name: "POD0"})
}

// fillStoragePod puts all datastores into the cluster, or none: the simulator finds no file of a datastore in two places.
func (w *world) fillStoragePod(now faults) {
	for _, each := range w.registry.All("StoragePod") {
		pod := each.(*simulator.StoragePod)
		pod.ChildEntity = nil
		for _, store := range w.registry.All("Datastore") {
			if now.StoragePod {
				pod.ChildEntity = append(pod.ChildEntity, store.Reference())
			}
		}
	}
}

// ageSnapshots makes the root snapshots of a VM older by a number of days.
func (w *world) ageSnapshots(rw http.ResponseWriter, r *http.Request) {
	var want struct {
		VM   string `json:"vm"`
		Days int    `json:"days"`
	}
	if err := json.NewDecoder(r.Body).Decode(&want); err != nil {
		http.Error(rw, err.Error(), http.StatusBadRequest)
		return
	}
	ref := types.ManagedObjectReference{Type: "VirtualMachine", Value: want.VM}
	trees := w.registry.Get(ref).(*simulator.VirtualMachine).Snapshot.RootSnapshotList
	for i := range trees {
		trees[i].CreateTime = trees[i].CreateTime.AddDate(0, 0, -want.Days)
	}
}
